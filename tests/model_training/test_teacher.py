"""Texts made for the teachers, the states and labels they give, against regressions fitted here."""

import json

import numpy as np
import pytest
import torch

from gemini.errors import DataError
from gemini.model.data import Review
from gemini.model.training import states, teacher


def test_variants_hold_words_of_the_texts_and_nothing_else():
    texts = ["one two three four", "five six seven", "eight"]
    made = states.variants(texts, 20)
    assert made == states.variants(texts, 20)
    assert len(made) == 60
    assert {word for text in made for word in text.split()} == {
        word for text in texts for word in text.split()
    }
    assert {"five six seven"} < set(made[20:40])  # crops, mixtures, losses


def test_words_are_whole_ones():
    class Pieces:
        def __len__(self):
            return 6

        def convert_ids_to_tokens(self, ids):
            return [["[PAD]", "##ing", "good", "it", "3rd", "schön"][index] for index in ids]

    assert states.bare_words(Pieces()) == ["It was good."]


def test_words_are_swapped_for_those_with_the_nearest_vectors(monkeypatch):
    words = ["good", "fine", "bad", "awful", "food"]
    table = torch.nn.Embedding.from_pretrained(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))

    class Pieces:
        def __len__(self):
            return 6

        def convert_ids_to_tokens(self, ids):
            return [["##ing", *words][index] for index in ids]  # pieces of words take no part

    class Known:
        tokenizer = Pieces()
        model = type("Model", (), {"get_input_embeddings": lambda _: table})()

    monkeypatch.setattr(states, "RELATED", 2)
    centred = table.weight[1:] - table.weight[1:].mean(0)

    def cosine(a, b):
        a, b = centred[words.index(a)], centred[words.index(b)]
        return float(a @ b / (a.norm() * b.norm()))

    allowed = {
        word: set(sorted(words, key=lambda other: cosine(word, other) if other != word else -2)[-2:])
        for word in words
    }
    related = states.related_words(Known)
    assert all(set(related(word)) == allowed[word] for word in words) and related("ing") == []
    text = "Good food, BAD unheard good's bad awful fine."
    made = states.swapped([text], Known, 200)
    assert made == states.swapped([text], Known, 200)
    shares = []
    for new in made:
        found = new.replace(",", "").replace(".", "").split()
        assert len(found) == 8 and new[-1] == "." and found[3] == "unheard"
        assert found[0].istitle() and found[2].isupper() and found[4] == "good's"
        pairs = [
            (a.lower(), b.lower()) for a, b in zip(text.replace(",", "")[:-1].split(), found, strict=True)
        ]
        assert all(b == a or b in allowed[a] for a, b in pairs if a not in ("unheard", "good's"))
        shares.append(sum(a != b for a, b in pairs) / 6)
    assert 0.28 < np.mean(shares) < 0.38  # shares are drawn from 0.15 to 0.5


class Encoder:
    """The states of a text are its letters' counts, the same in all of its 6 layers, and at 2 positions."""

    class Tokenizer:
        def __len__(self):
            return 0

        def convert_ids_to_tokens(self, ids):
            return []

        def __call__(self, texts, **_):
            counts = np.array([[text.count(letter) for letter in "abcdefghij"] for text in texts])
            mask = torch.ones(len(texts), 2, dtype=torch.int64)
            return {"counts": torch.from_numpy(counts).float(), "attention_mask": mask}

    class Model:
        def eval(self):
            return self

        def get_input_embeddings(self):
            return torch.nn.Embedding(0, 4)

        def __call__(self, counts, attention_mask, output_hidden_states):
            states = counts[:, None].expand(-1, attention_mask.shape[1], -1)
            return type("Output", (), {"hidden_states": [states] * 7})

    tokenizer, model = Tokenizer(), Model()


@pytest.fixture
def invented(monkeypatch):
    """Letters as reviews: more a than b is good, and in Chinese more 好 than 坏."""
    generator = np.random.default_rng(0)

    def reviews(letters, language, good, bad):
        texts = ["".join(generator.choice(list(letters), 12)) for _ in range(120)]
        return [
            Review(text, int(text.count(good) > text.count(bad)), language, "train" if at < 100 else "valid")
            for at, text in enumerate(texts)
        ]

    known = [*reviews("abcdefghij", "en", "a", "b"), *reviews("好坏了的很不", "zh", "好", "坏")]

    def load(cache, split, language):
        return [review for review in known if (review.split, review.language) == (split, language)]

    for module in (states, teacher):
        monkeypatch.setattr(module, "load_checkpoint", lambda name: Encoder)
        monkeypatch.setattr(module, "load_sentiment", load)
    monkeypatch.setattr(states, "find", lambda name: None)
    return load


def test_states_are_standardized_means_in_three_splits(invented, tmp_path):
    path = states.ensure_states(tmp_path)
    texts, arrays = states.load_arrays(path)
    reviews = [review.text for review in invented(None, "train", "en")]
    assert texts[: arrays["reviews"]] == reviews and len(texts) == arrays["made"] > 300
    counts = np.array([[text.count(letter) for letter in "abcdefghij"] for text in texts], float)
    own = counts[: len(reviews)]
    expected = np.tile((counts - own.mean(0)) / own.std(0), 3)
    np.testing.assert_allclose(arrays["states"], expected, rtol=1e-3, atol=1e-3)  # float16
    parts = {split: states.read_states(path, split) for split in ("train", "valid", "test")}
    assert parts["valid"][0] == texts[::50] and parts["test"][0] == texts[1::50]
    assert sorted(text for part, _ in parts.values() for text in part) == sorted(texts)
    np.testing.assert_array_equal(parts["test"][1], arrays["states"][1::50])
    before = path.stat().st_mtime_ns
    assert states.ensure_states(tmp_path).stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="missing or damaged"):
        states.load_arrays(path)


def test_english_reviews_are_labelled_by_who_did_not_see_them(invented, tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, predict = teacher.english_labels(tmp_path)
    reviews, valid = invented(None, "train", "en"), invented(None, "valid", "en")
    assert [row["text"] for row in rows[:100]] == [review.text for review in reviews]
    counts = states.features(Encoder, [review.text for review in reviews])
    labels = np.array([review.label for review in reviews])
    found = np.array([row["positive"] for row in rows[:100]])
    for others, fold in StratifiedKFold(5, shuffle=True, random_state=0).split(counts, labels):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        model.fit(counts[others], labels[others])
        # States are kept as float16, probabilities with four digits.
        np.testing.assert_allclose(found[fold], model.predict_proba(counts[fold])[:, 1], atol=2e-3, rtol=0)
    right = (predict([review.text for review in valid]) > 0.5) == [review.label for review in valid]
    assert right.mean() > 0.8


def test_log_count_ratios_follow_their_formula():
    texts, labels = ["好好", "好的", "坏的", "坏坏", "好坏"], [1, 1, 0, 0, 1]
    pipeline = teacher.log_count_teacher().fit(texts, labels)
    counter, ratio = pipeline[0], pipeline[1].ratio_
    assert list(counter.get_feature_names_out()) == ["坏", "好", "的"]  # in at least two texts
    good, bad = np.array([1 + 1, 1 + 3, 1 + 1]), np.array([1 + 2, 1 + 0, 1 + 1])
    np.testing.assert_allclose(ratio, np.log((good / good.sum()) / (bad / bad.sum())), rtol=1e-12)
    rows = pipeline[:2].transform(["好的"]).toarray()
    np.testing.assert_allclose(rows, [[0, ratio[1], ratio[2]]], rtol=1e-12)


def test_three_teachers_of_chinese_have_a_vote_each(invented):
    reviews, valid = invented(None, "train", "zh"), [review.text for review in invented(None, "valid", "zh")]
    fitted = teacher.character_teacher().fit([r.text for r in reviews], [r.label for r in reviews])
    votes = [part.predict_proba(valid) for part in fitted.estimators_]
    assert len(votes) == 3 and not np.allclose(votes[0], votes[1], atol=1e-2)
    np.testing.assert_allclose(fitted.predict_proba(valid), sum(votes) / 3, atol=1e-12)


def test_the_file_of_labels_is_made_once(invented, tmp_path):
    figures = teacher.write_labels(tmp_path / "labels.jsonl", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert len(rows) == figures["texts"] > 300 and all(0 <= row["positive"] <= 1 for row in rows)
    assert {row["language"] for row in rows} == {"en", "zh"}
    assert figures["valid_en"] > 80 and figures["valid_zh"] > 70
    path = teacher.ensure_labels(tmp_path)
    assert path.read_bytes() == (tmp_path / "labels.jsonl").read_bytes()
    path.write_text("kept")
    assert teacher.ensure_labels(tmp_path).read_text() == "kept"


def test_parts_of_chinese_reviews_are_joined_as_they_were_written():
    made = states.variants(["这家店很好", "房间不大"], 30)
    assert not any(" " in text for text in made) and {"这家店很好"} < set(made)
