"""Kept prefixes against runs without them: the same logits and tokens, bounded memory, guarded files."""

import numpy as np
import pytest

from gemini.errors import BundleError, RequestError
from gemini.runtime import GenerationOptions, decoder, load
from gemini.runtime.prefixes import Prefix, PrefixCache, common

TOLERANCE = 2e-4  # as in test_decoder: float32 sums of some 32 products of size 1
PROMPT = [5, 9, 40, 7, 8, 250, 12, 100, 31, 64, 6, 77]
OPTIONS = GenerationOptions(max_new_tokens=9, ignore_eos=True)
ROOM = 2**20


def prefix(*tokens):
    row = np.array(tokens)
    return Prefix(row, (np.repeat(row, 4).reshape(1, -1, 4).astype(np.float32),))


def test_the_common_beginning_equals_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(200):
        first, second = (rng.integers(0, 2, rng.integers(0, 6)) for _ in range(2))
        count = 0
        while count < min(first.size, second.size) and first[count] == second[count]:
            count += 1
        assert common(first, second) == count


def test_the_least_recently_used_goes_and_a_continued_one_is_dropped():
    cache = PrefixCache(3 * prefix(1, 2).nbytes)
    for tokens in ((1, 2), (3, 4), (5, 6)):
        cache.keep(prefix(*tokens))
    count, found = cache.longest(np.array([1, 2, 9]))
    assert count == 2 and found.tokens.tolist() == [1, 2]
    cache.keep(prefix(7, 8))
    assert [p.tokens.tolist() for p in cache.held()] == [[5, 6], [1, 2], [7, 8]]
    cache.keep(prefix(7, 8, 9))
    assert [p.tokens.tolist() for p in cache.held()] == [[1, 2], [7, 8, 9]]
    cache.keep(prefix(1))  # a longer one begins with it
    assert [p.tokens.tolist() for p in cache.held()] == [[1, 2], [7, 8, 9]]
    cache.keep(prefix(*range(50)))
    assert len(cache.held()) == 2 and cache.nbytes <= cache.limit
    assert cache.longest(np.array([99])) is None


def test_tokens_are_those_of_a_session_that_keeps_nothing(shared_toy):
    plain, keeping = load(shared_toy.path, threads=1), load(shared_toy.path, threads=1)
    keeping.keep_prefixes(ROOM)
    rng = np.random.default_rng(1)
    for _ in range(12):
        size = int(rng.integers(1, len(PROMPT) + 1))
        prompt = PROMPT[:size] + rng.integers(3, 200, int(rng.integers(0, 4))).tolist()
        assert keeping.generate_ids([prompt], OPTIONS) == plain.generate_ids([prompt], OPTIONS)
    assert keeping.memory()["prefixes"] > 0 == plain.memory()["prefixes"]


def test_only_what_follows_is_computed_and_the_logits_are_the_reference(shared_toy, monkeypatch):
    session = load(shared_toy.path, threads=1)
    session.keep_prefixes(ROOM)
    (answer,) = session.generate_ids([PROMPT], OPTIONS)
    sizes, advance = [], decoder.Decoder._advance
    monkeypatch.setattr(
        decoder.Decoder, "_advance", lambda self, tokens: (sizes.append(tokens.size), advance(self, tokens))
    )
    longer = [*PROMPT, *answer[:-1], 11, 12]  # a conversation: the answer is part of what is known
    logits = session.decoder().prefill([longer])
    assert sizes == [2]
    np.testing.assert_allclose(logits[0], shared_toy.reference(longer)[-1], atol=TOLERANCE, rtol=TOLERANCE)
    logits = session.decoder().prefill([PROMPT])  # all of it is known, and its last logits are wanted
    assert sizes == [2, 1]
    np.testing.assert_allclose(logits[0], shared_toy.reference(PROMPT)[-1], atol=TOLERANCE, rtol=TOLERANCE)


def test_drafts_that_were_taken_back_are_not_kept(shared_toy):
    session = load(shared_toy.path, threads=1)
    session.keep_prefixes(ROOM)
    batch = session.decoder()
    batch.prefill([PROMPT])
    batch.extend([20, 21, 22])
    batch.rewind(2)
    batch.step([33])
    batch.close()
    (kept,) = session._prefixes.held()
    assert kept.tokens.tolist() == [*PROMPT, 20, 33]
    longer = [*PROMPT, 20, 33, 44]
    np.testing.assert_allclose(
        session.decoder().prefill([longer])[0],
        shared_toy.reference(longer)[-1],
        atol=TOLERANCE,
        rtol=TOLERANCE,
    )


def test_nothing_is_kept_of_a_call_that_failed(shared_toy, monkeypatch):
    session = load(shared_toy.path, threads=1)
    session.keep_prefixes(ROOM)
    batch = session.decoder()
    batch.prefill([PROMPT])

    def fails(graph, binding):
        raise BundleError("broken")

    monkeypatch.setattr(decoder, "run_bound", fails)
    with pytest.raises(BundleError, match="broken"):
        batch.step([20])
    batch.close()
    assert session.memory()["prefixes"] == 0


@pytest.mark.parametrize("chunk", [1, 5, 12, 64])
def test_a_prompt_read_in_pieces_has_the_logits_of_the_reference(shared_toy, monkeypatch, chunk):
    monkeypatch.setattr(decoder, "CHUNK", {"cpu": chunk})
    batch = load(shared_toy.path, threads=1).decoder(4)
    ids = list(PROMPT)
    logits = batch.prefill([ids])
    for _ in range(4):
        expected = shared_toy.reference(ids)[-1]
        np.testing.assert_allclose(logits[0], expected, atol=TOLERANCE, rtol=TOLERANCE)
        ids.append(int(expected.argmax()))
        logits = batch.step(ids[-1:])


def test_saved_prefixes_serve_another_session(shared_toy, tmp_path, monkeypatch):
    path, first, second = tmp_path / "p", load(shared_toy.path, threads=1), load(shared_toy.path, threads=1)
    first.keep_prefixes(ROOM)
    expected = first.generate_ids([PROMPT], OPTIONS)
    first.save_prefixes(path)
    assert [file.name for file in tmp_path.iterdir()] == ["p"]
    second.keep_prefixes(ROOM)
    second.restore_prefixes(path)
    assert second.memory()["prefixes"] == first.memory()["prefixes"] > 0
    assert second._prefixes.longest(np.array(PROMPT))[0] == len(PROMPT)
    assert second.generate_ids([PROMPT], OPTIONS) == expected


def test_files_that_are_not_to_be_trusted_are_refused(shared_toy, tmp_path):
    session = load(shared_toy.path, threads=1)
    with pytest.raises(RequestError, match="No prefixes are kept"):
        session.save_prefixes(tmp_path / "p")
    session.keep_prefixes(ROOM)
    session.generate_ids([PROMPT], OPTIONS)
    session.save_prefixes(tmp_path / "p")
    data = (tmp_path / "p").read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    with np.load(tmp_path / "p") as file:
        arrays = dict(file)
    for name, changed in (
        ("cut", data[: len(data) // 2]),
        ("flipped", bytes(flipped)),
        ("text", b"hello"),
        ("empty", b""),
        ("array", np.zeros(3)),
        ("pickle", np.array([{}], object)),
        ("foreign", {**arrays, "bundle": np.array("sha256:0")}),
        ("shape", {**arrays, "0.0": arrays["0.0"][:, :-1]}),
        ("short", {k: v for k, v in arrays.items() if k != "0.3"}),
        ("other", {"x": np.zeros(2)}),
        ("bomb", None),
    ):
        path = tmp_path / name
        with path.open("wb") as file:
            if isinstance(changed, bytes):
                file.write(changed)
            elif isinstance(changed, dict):
                np.savez(file, **changed)
            elif changed is None:
                np.savez_compressed(file, **arrays)
            else:
                np.save(file, changed)
        with pytest.raises(BundleError):
            session.restore_prefixes(path)
    with pytest.raises(BundleError, match="damaged"):
        session.restore_prefixes(tmp_path / "missing")


def test_limits_that_are_no_bytes_and_caches_without_prefixes_are_refused(new_decoder, shared_toy):
    session = load(shared_toy.path, threads=1)
    for limit in (-1, 1.5, True):
        with pytest.raises(RequestError, match="bytes"):
            session.keep_prefixes(limit)
    with pytest.raises(RequestError, match="cannot be begun"):
        load(new_decoder("concat").path, threads=1).keep_prefixes(ROOM)
    session.keep_prefixes(ROOM)
    session.generate_ids([PROMPT], OPTIONS)
    session.keep_prefixes(0)
    assert session.memory()["prefixes"] == 0
