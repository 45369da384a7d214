"""Generation from a source: texts, images, both; against numpy, and with everything that cannot be read."""

import numpy as np
import pytest

from gemini.errors import BundleError, RequestError
from gemini.runtime import Seq2SeqGenerator, load

TEXTS = ["the sea is grey", "one", "a small stone lay on the road"]
# Sums of at most forty float32 numbers.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def session(pair_toy) -> Seq2SeqGenerator:
    loaded = load(pair_toy.path)
    assert isinstance(loaded, Seq2SeqGenerator)
    return loaded


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(1).random((count, 3, 2, 2), dtype=np.float32)


def greedy(reference, source, picture, count: int) -> list[int]:
    """By whole recomputation, the suppressed token never chosen."""
    ids = [0]
    for _ in range(count):
        logits = reference(ids, source, picture)[-1]
        logits[2] = -np.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == 1:
            break
    return ids[1:]


@pytest.mark.parametrize("images", [False, True])
def test_padded_batch_generates_what_numpy_recomputes(images, session, pair_toy):
    sources = [session.tokenizer.encode(text) for text in TEXTS]
    pictures = pixels(3) if images else None
    rows = session.generate_ids(sources, pictures, session._options({"max_new_tokens": 10}))
    for row, (source, answer) in enumerate(zip(sources, rows, strict=True)):
        picture = None if pictures is None else pictures[row]
        assert answer == greedy(pair_toy.reference, source, picture, 10)


def test_an_answer_begins_as_asked_and_does_not_repeat_it(session, pair_toy):
    source = session.tokenizer.encode(TEXTS[1])
    begin = session.tokenizer.encode("one", special_tokens=False)
    ids = [0, *begin]
    for _ in range(6):
        logits = pair_toy.reference(ids, source)[-1]
        logits[2] = -np.inf
        ids.append(int(logits.argmax()))
    expected = ids[1 + len(begin) :]
    answer = session.generate(TEXTS[1], begin="one", max_new_tokens=6, ignore_eos=True)
    assert list(answer.tokens) == expected
    assert answer.tokens != session.generate(TEXTS[1], max_new_tokens=6, ignore_eos=True).tokens
    pieces = session.stream(TEXTS[1], begin="one", max_new_tokens=6, ignore_eos=True)
    assert "".join(pieces) == answer.text
    beams = session.generate(TEXTS, begin="one", max_new_tokens=6, num_beams=2)
    alone = session.generate(TEXTS[1], begin="one", max_new_tokens=6, num_beams=2)
    assert beams[1] == alone
    with pytest.raises(RequestError, match="begin is 3"):
        session.generate(TEXTS[1], begin=3)


def test_an_answer_without_an_encoder_cannot_be_begun(decoder_toy):
    with pytest.raises(RequestError, match="end of the prompt"):
        load(decoder_toy.path).generate("one", begin="two")


@pytest.mark.parametrize("images", [False, True])
def test_forced_logits_equal_numpy(images, session, pair_toy):
    source = session.tokenizer.encode(TEXTS[0])
    pictures = pixels(1) if images else None
    logits = session.logits([source], [[7, 9, 30]], pictures)
    expected = pair_toy.reference([0, 7, 9, 30], source, None if pictures is None else pictures[0])
    np.testing.assert_allclose(logits[0], expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_continuation_predicts_the_second_half_of_a_window(session, pair_toy):
    window = np.array([[40, 41, 42, 43, 44, 45]])
    expected = pair_toy.reference([0, 43, 44, 45], [40, 41, 42])
    np.testing.assert_allclose(session.continuation(window)[0], expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_texts_and_images_in_every_combination(session):
    image = np.random.default_rng(2).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    alone = session.generate(image=image, max_new_tokens=4)
    asked = session.generate("what is it", image, max_new_tokens=4)
    assert (
        alone == asked and alone.tokens == session.generate("what is it", [image], max_new_tokens=4)[0].tokens
    )
    both = session.generate(["what is it", "one"], [image, image], max_new_tokens=4)
    assert both[0].tokens == alone.tokens and len(both) == 2
    for text, picture in (("one", None), ("one", image), (None, image)):
        answer = session.generate(text, picture, max_new_tokens=6)
        assert "".join(session.stream(text, picture, max_new_tokens=6)) == answer.text


LABELS = {"prefixes": {"text-classification": "the"}, "label_ids": {"bad": 40, "good": 50}}


def test_the_token_of_a_label_classifies(new_pair):
    toy = new_pair(generation={**LABELS, "longest_classified": 8})
    session = load(toy.path)
    for text, labels in zip(TEXTS, session.classify(TEXTS), strict=True):
        source = session.tokenizer.encode("the" + text)
        read = source if len(source) <= 8 else source[:4] + source[-4:]
        shares = np.exp(toy.reference([0], read)[-1][[40, 50]])
        best = int(shares.argmax())
        assert [label.label for label in labels] == [("bad", "good")[best], ("bad", "good")[1 - best]]
        assert labels[0].score == pytest.approx(shares[best] / shares.sum(), abs=TOLERANCE)
    for texts, match in (([], "not a list"), ("one", "not a list"), ([3], "not a str")):
        with pytest.raises(RequestError, match=match):
            session.classify(texts)


def test_a_model_without_labels_does_not_classify(session):
    with pytest.raises(RequestError, match="does not classify"):
        session.classify(TEXTS)


@pytest.mark.parametrize("ids", [{"bad": 999}, {"bad": -1}, {"bad": "40"}])
def test_a_label_that_is_no_token_damages_the_bundle(ids, new_pair):
    with pytest.raises(BundleError):
        load(new_pair(generation={"label_ids": ids}).path)


@pytest.mark.parametrize(
    ("text", "image", "match"),
    [
        (None, None, "neither a text nor an image"),
        ([], None, "empty"),
        (["a", "b"], [np.zeros((2, 2, 3), np.uint8)] * 3, "3 images and 2 texts"),
        (3, None, "neither a text nor a list"),
        ("x" * 400, None, "context holds 48"),
        ("", None, "prompt is empty"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(text, image, match, session):
    with pytest.raises(RequestError, match=match):
        session.generate(text, image)


def test_pixels_and_ids_are_checked(session):
    for sources, pictures, match in (
        ([[999]], None, "outside"),
        ([[5]], np.zeros((1, 3, 9, 9), np.float32), "pixel_values have shape"),
        ([[5]], pixels(2), "2 images and 1 texts"),
        (None, pixels(1), "no text"),
    ):
        with pytest.raises(RequestError, match=match):
            session.encode(sources, pictures)
    with pytest.raises(RequestError, match="do not fit into the context of 40"):
        session.generate("one", max_new_tokens=40)
    with pytest.raises(RequestError, match="one source"):
        session.stream(["a", "b"])


def test_model_without_images_refuses_them(new_pair):
    session = load(new_pair(images=False).path)
    assert len(session.generate("one", max_new_tokens=2).tokens) <= 2
    with pytest.raises(RequestError, match="reads no images"):
        session.generate("one", np.zeros((2, 2, 3), np.uint8))


def test_inference_reads_the_source_and_steps(session):
    inference = session.inference(3)
    with pytest.raises(RequestError, match="before any prefill"):
        inference.step(np.array([5]))
    sources = [session.tokenizer.encode(text) for text in TEXTS]
    first = inference.prefill(sources).argmax(-1)
    second = inference.step(first).argmax(-1)
    inference.close()
    rows = session.generate_ids(sources, None, session._options({"max_new_tokens": 2, "ignore_eos": True}))
    assert np.array_equal(np.stack([first, second], 1), rows)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": {"inputs": ["input_ids", "mask"]}}, "unknown"),
        ({"model": {"vocab_size": None}}, "do not fit"),
        ({"model": {"image": None}}, "do not fit"),
        ({"model": {"image": {"channels": 3, "height": 2, "width": 2}}}, "size of the image vectors"),
        ({"model": {"cross": []}}, "empty"),
        ({"model": {"cross": [{"kv_heads": 1, "key_dim": 5, "value_dim": 4}]}}, "not what the manifest says"),
        ({"generation": {"decoder_start_ids": []}}, "token to start with"),
        ({"generation": {"suppressed_ids": [999]}}, "outside the vocabulary"),
        ({"generation": {"prefixes": {"x": 3}}}, "not a text"),
    ],
)
def test_malformed_manifests_are_refused(changes, match, new_pair):
    with pytest.raises(BundleError, match=match):
        load(new_pair(**changes).path)
