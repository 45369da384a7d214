"""Texts to be labelled by the teacher, and what it labels, against a regression fitted here."""

import json

import numpy as np
import pytest
import torch

from gemini.model.data import Review
from gemini.model.training import teacher


def test_variants_hold_words_of_the_texts_and_nothing_else():
    texts = ["one two three four", "five six seven", "eight"]
    made = teacher.variants(texts, 20)
    assert made == teacher.variants(texts, 20)
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

    assert teacher.words(Pieces()) == ["good"]


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

        def __call__(self, counts, attention_mask, output_hidden_states):
            states = counts[:, None].expand(-1, attention_mask.shape[1], -1)
            return type("Output", (), {"hidden_states": [states] * 7})

    tokenizer, model = Tokenizer(), Model()


@pytest.fixture
def invented(monkeypatch):
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("abcdefghij"), 12)) for _ in range(120)]
    reviews = {
        split: [Review(text, int(text.count("a") > text.count("b")), "en", split) for text in part]
        for split, part in (("train", texts[:100]), ("valid", texts[100:]))
    }
    monkeypatch.setattr(teacher, "find", lambda name: None)
    monkeypatch.setattr(teacher, "load_checkpoint", lambda name: Encoder)
    monkeypatch.setattr(teacher, "load_sentiment", lambda cache, split: reviews[split])
    return reviews


def test_reviews_are_labelled_by_who_did_not_see_them(invented, tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, accuracy = teacher.soft_labels(tmp_path)
    reviews = invented["train"]
    assert [row["text"] for row in rows[:100]] == [review.text for review in reviews]
    assert accuracy > 80
    counts = teacher.features(Encoder, [review.text for review in reviews])
    labels = np.array([review.label for review in reviews])
    found = np.array([row["positive"] for row in rows[:100]])
    for others, fold in StratifiedKFold(5).split(counts, labels):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        model.fit(counts[others], labels[others])
        # The file keeps four digits.
        np.testing.assert_allclose(found[fold], model.predict_proba(counts[fold])[:, 1], atol=6e-5, rtol=0)


def test_the_file_is_made_once(invented, tmp_path):
    path = teacher.ensure_teacher(tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(0 <= row["positive"] <= 1 for row in rows) and len(rows) > 100
    path.write_text("kept")
    assert teacher.ensure_teacher(tmp_path).read_text() == "kept"
