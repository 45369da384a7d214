"""Embedding and classification of texts with toy encoders."""

import numpy as np
import pytest

from gemini.errors import BundleError, RequestError, UsageError
from gemini.runtime import Embedder, TextClassifier, encoder, load
from gemini.runtime.encoder import scores

TEXTS = ["one two", "the sea is grey and the wind is cold", "", "a", "你好 🙂", "the road " * 30]
TOLERANCE = 1e-5  # float32 sums of a few dozen values of size 1


def token_ids(session, text):
    """Text tokens between <s> and </s>, cut so that both stay."""
    body = session.tokenizer.inner.encode(text, add_special_tokens=False).ids
    return [0, *body[: session.model.context_length - 2], 1]


def test_embeddings_equal_the_reference_in_any_order_and_batch(new_encoder):
    toy = new_encoder("feature-extraction")
    session = load(toy.path, threads=1)
    assert isinstance(session, Embedder)
    expected = np.stack([toy.reference(token_ids(session, text)) for text in TEXTS])
    for size in (1, 2, 32):
        result = session.embed(TEXTS, batch_size=size)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, atol=TOLERANCE)


def test_padding_uses_the_id_of_the_tokenizer_or_of_the_manifest(new_encoder):
    tokenizer = load(new_encoder("feature-extraction").path, threads=1).tokenizer
    rows = tokenizer.encode_rows(["a", "one two the"], 24)
    batch = tokenizer.stack(rows)
    assert batch.attention_mask[0].tolist() == [1, 1, 1, *[0] * (batch.input_ids.shape[1] - 3)]
    assert set(batch.input_ids[0, 3:].tolist()) == {2}
    assert tokenizer.stack(rows, pad_id=7).input_ids[0, -1] == 7


def test_a_batch_holds_texts_of_one_length_so_that_nothing_is_padded(new_encoder, monkeypatch):
    monkeypatch.setattr(encoder, "WINDOW", 2)  # six texts a window, so several
    session = load(new_encoder("feature-extraction").path, threads=1)
    texts = [*TEXTS, "two one", "b", "c", "d", "e"]
    seen = []
    for positions, tokens in session._encoder.batches(texts, 3):
        assert tokens.attention_mask.all() and 1 <= len(positions) <= 3
        for position, ids in zip(positions, tokens.input_ids.tolist(), strict=True):
            assert ids == token_ids(session, texts[position])
        seen.append(positions)
    assert sorted(position for positions in seen for position in positions) == list(range(len(texts)))
    assert max(map(len, seen)) == 3


def test_a_long_text_is_cut_at_the_context_and_keeps_its_special_tokens(new_encoder):
    session = load(new_encoder("feature-extraction").path, threads=1)
    (row,) = session.tokenizer.encode_rows(["the road " * 30], 24)
    assert len(row.ids) == 24 and (row.ids[0], row.ids[-1]) == (0, 1)


@pytest.mark.parametrize("problem", [None, "single_label", "multi_label", "regression"])
def test_classes_come_best_first_with_scores_of_their_problem(new_encoder, problem):
    toy = new_encoder("text-classification", problem=problem)
    session = load(toy.path, threads=1)
    assert isinstance(session, TextClassifier)
    logits = np.stack([toy.reference(token_ids(session, text)) for text in TEXTS])
    np.testing.assert_allclose(session.logits(TEXTS), logits, atol=TOLERANCE)
    if problem == "multi_label":
        expected = 1 / (1 + np.exp(-logits))
    elif problem == "regression":
        expected = logits
    else:
        expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for row, labels in enumerate(session.classify(TEXTS)):
        order = np.argsort(-expected[row])
        assert [label.label for label in labels] == [["bad", "fine", "good"][i] for i in order]
        np.testing.assert_allclose([label.score for label in labels], expected[row][order], atol=TOLERANCE)


def test_extreme_logits_give_finite_scores():
    logits = np.array([[1e4, -1e4, 0]], np.float32)
    for problem in ("single_label", "multi_label"):
        assert np.isfinite(scores(logits, problem)).all()
    np.testing.assert_array_equal(scores(logits, "multi_label"), [[1.0, 0.0, 0.5]])


@pytest.mark.parametrize("texts", ["a text", [], [5], ["a", None], None, {"a": 1}, ["\ud800"]])
def test_what_is_no_list_of_texts_is_refused(new_encoder, texts):
    with pytest.raises(RequestError):
        load(new_encoder("feature-extraction").path, threads=1).embed(texts)


def test_ids_outside_the_vocabulary_and_bad_batch_sizes_are_refused(new_encoder):
    session = load(new_encoder("feature-extraction", vocab_size=5).path, threads=1)
    with pytest.raises(RequestError, match="token id"):
        session.embed(["one two"])
    for size in (0, -1, 1.5, True):
        with pytest.raises(RequestError, match="batch size"):
            session.embed(["a"], batch_size=size)


def test_a_classifier_without_fitting_labels_is_refused(new_encoder):
    with pytest.raises(BundleError, match="3 scores for 2 labels"):
        load(new_encoder("text-classification", labels=["a", "b"]).path, threads=1).classify(["x"])


def test_unknown_encoder_inputs_are_refused(new_encoder):
    with pytest.raises(BundleError, match="unknown"):
        load(new_encoder("feature-extraction", inputs=["input_ids", "attention_mask", "pixels"]).path)


def test_a_graph_with_other_inputs_than_the_manifest_is_refused(new_encoder):
    with pytest.raises(BundleError, match="token_type_ids"):
        load(new_encoder("feature-extraction", inputs=["input_ids", "attention_mask"]).path)


def test_only_text_generators_are_loaded_without_a_tokenizer(new_encoder):
    with pytest.raises(UsageError, match="no use for skip_tokenizer"):
        load(new_encoder("feature-extraction").path, skip_tokenizer=True)
