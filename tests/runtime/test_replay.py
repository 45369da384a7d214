"""Recorded decode steps: the same logits as unrecorded ones, whatever was in the buffers before.

A recording is bound to fixed buffers on every device, so all but the recording itself runs on the CPU too.
"""

from dataclasses import replace

import numpy as np
import pytest

from gemini.runtime import load, replay
from gemini.runtime.replay import Recordings, round_up

# float32 sums of the toy against float64; half precision on a GPU.
TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-2
PROMPTS = [[5, 9, 40, 7, 12], [3], [8, 30, 6]]
STEPS = [[4, 5, 6], [20, 21, 22], [9, 9, 9]]


@pytest.fixture(params=[0, 2], ids=["recorded at once", "recorded from the third step"])
def early(request, monkeypatch):
    monkeypatch.setattr(replay, "STEPS_BEFORE", request.param)


@pytest.fixture
def generator(shared_toy):
    """A session whose steps go through recordings, on the CPU."""
    session = load(shared_toy.path, device="cpu", threads=1)
    session.graph = replace(session.graph, recordings=Recordings(session.graph.session, "cpu"))
    return session


def check_steps(session, toy, tolerance):
    decoder = session.decoder(new_tokens=len(STEPS))
    logits = decoder.prefill(PROMPTS)
    texts = [list(prompt) for prompt in PROMPTS]
    for tokens in [*STEPS, None]:
        expected = np.stack([toy.reference(text)[-1] for text in texts])
        np.testing.assert_allclose(logits, expected, atol=tolerance, rtol=tolerance)
        if tokens is not None:
            logits = decoder.step(tokens)
            texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
    decoder.close()


def test_recorded_steps_give_the_logits_of_the_reference(generator, shared_toy, early):
    check_steps(generator, shared_toy, TOLERANCE)


def test_what_another_batch_left_in_the_buffers_changes_nothing(generator, shared_toy):
    for _ in range(2):
        other = generator.decoder(len(STEPS))
        other.prefill([[70, 71, 72, 73, 74, 75], [80], [90, 91]])
        other.step([1, 2, 3])
        other.close()
        check_steps(generator, shared_toy, TOLERANCE)
    assert generator.graph.recordings._made == 1  # the same buffers each time


def test_a_cache_that_grows_moves_to_a_larger_recording(generator, shared_toy, monkeypatch):
    monkeypatch.setattr(replay.kv, "BLOCK", 2)
    decoder = generator.decoder()
    text = list(PROMPTS[0])
    logits = decoder.prefill([text])
    for token in range(10, 24):
        np.testing.assert_allclose(logits[0], shared_toy.reference(text)[-1], atol=TOLERANCE, rtol=TOLERANCE)
        logits = decoder.step([token])
        text.append(token)
    decoder.close()
    assert sorted(each.capacity for each in generator.graph.recordings._free) == [8, 16, 32]


def test_batches_in_flight_have_buffers_of_their_own(generator, shared_toy):
    first, second = generator.decoder(4), generator.decoder(4)
    one, other = [5, 9, 40], [60, 61, 62]
    first.prefill([one])
    second.prefill([other])
    for decoder, text in ((first, one), (second, other), (first, [*one, 7])):
        logits = decoder.step([7])
        expected = shared_toy.reference([*text, 7])[-1]
        np.testing.assert_allclose(logits[0], expected, atol=TOLERANCE, rtol=TOLERANCE)
    first.close()
    second.close()


def test_only_the_last_few_recordings_are_kept(generator):
    for batch in range(1, replay.KEPT + 3):
        decoder = generator.decoder(2)
        decoder.prefill([[5, 6]] * batch)
        decoder.close()
    kept = [each.batch for each in generator.graph.recordings._free]
    assert kept == list(range(3, replay.KEPT + 3))


def test_drafted_tokens_and_recorded_steps_share_a_cache(generator, shared_toy):
    decoder = generator.decoder(8)
    decoder.prefill([[5, 9, 40]])
    decoder.extend([7, 8, 9])
    decoder.rewind(2)
    logits = decoder.step([50])
    expected = shared_toy.reference([5, 9, 40, 7, 50])[-1]
    np.testing.assert_allclose(logits[0], expected, atol=TOLERANCE, rtol=TOLERANCE)
    decoder.close()


@pytest.mark.parametrize(
    ("tokens", "limit", "room"), [(1, 8192, 64), (65, 8192, 128), (128, 8192, 128), (129, 200, 200)]
)
def test_room_is_a_power_of_two_within_the_context(tokens, limit, room):
    assert round_up(tokens, limit) == room


@pytest.mark.gpu
def test_a_gpu_gives_the_logits_of_the_reference(half_toy, early):
    session = load(half_toy.path, device="cuda")
    assert session.device == "cuda" and session.graph.recordings is not None
    for _ in range(2):
        check_steps(session, half_toy, HALF_TOLERANCE)


@pytest.mark.gpu
def test_a_gpu_generates_beside_drafts_and_beams(half_toy):
    session = load(half_toy.path, device="cuda")
    plain = session.generate("the sea is grey and the sea is", max_new_tokens=12)
    drafted = session.generate("the sea is grey and the sea is", max_new_tokens=12, speculate="lookup")
    assert plain.tokens == drafted.tokens
    assert session.generate("one two", max_new_tokens=6, num_beams=3).tokens
    assert session.logits(np.array([[5, 9, 40]])).shape == (1, 3, half_toy.vocab_size)


@pytest.mark.gpu
def test_a_cache_that_grows_with_every_step_is_not_recorded(new_decoder):
    toy = new_decoder("concat", half=True)
    session = load(toy.path, device="cuda")
    assert session.device == "cuda" and session.graph.recordings is None
    logits = session.prefill([[5, 9, 40]], new_tokens=1)
    np.testing.assert_allclose(logits[0], toy.reference([5, 9, 40])[-1], atol=HALF_TOLERANCE)
    np.testing.assert_allclose(
        session.step([7])[0], toy.reference([5, 9, 40, 7])[-1], atol=HALF_TOLERANCE, rtol=HALF_TOLERANCE
    )
