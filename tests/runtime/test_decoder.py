"""The decoder with its cache against a float64 recomputation of every position."""

import numpy as np
import pytest

from gemini.errors import BundleError, RequestError
from gemini.runtime import load
from gemini.runtime.kv import BLOCK, round_up

# float32 sums of some 32 products of size 1, twice, against float64; rotary angles are float32 too.
TOLERANCE = 2e-4
PROMPTS = [[5, 9, 40, 7], [3], [8, 8, 250, 12, 100, 31, 64]]


def ids(seed, *shape):
    return np.random.default_rng(seed).integers(3, 280, shape)


def test_prefill_and_steps_equal_full_recomputation(decoder_toy):
    generator = load(decoder_toy.path, threads=1)
    sequence = ids(0, 30).tolist()
    logits = generator.prefill([sequence[:11]], new_tokens=19)
    for end in range(11, 30):
        np.testing.assert_allclose(logits[0], decoder_toy.reference(sequence[:end])[-1], atol=TOLERANCE)
        logits = generator.step([sequence[end]])
    np.testing.assert_allclose(logits[0], decoder_toy.reference(sequence)[-1], atol=TOLERANCE)


def test_rows_of_a_ragged_batch_equal_their_single_runs(shared_toy):
    generator = load(shared_toy.path, threads=1)
    rows = [list(prompt) for prompt in PROMPTS]
    logits = generator.prefill(rows, new_tokens=20)
    for column in ids(1, 20, 3):
        for row, tokens in enumerate(rows):
            np.testing.assert_allclose(logits[row], shared_toy.reference(tokens)[-1], atol=TOLERANCE)
        logits = generator.step(column)
        rows = [[*tokens, int(new)] for tokens, new in zip(rows, column, strict=True)]


def test_equal_prompts_are_batched_with_a_concatenated_cache(concat_toy):
    generator = load(concat_toy.path, threads=1)
    rows = ids(2, 3, 6).tolist()
    generator.prefill(rows)
    logits = generator.step([4, 5, 6])
    for row in range(3):
        expected = concat_toy.reference([*rows[row], 4 + row])[-1]
        np.testing.assert_allclose(logits[row], expected, atol=TOLERANCE)


def test_cache_grows_in_blocks_without_changing_logits(shared_toy):
    generator = load(shared_toy.path, threads=1)
    rows = [[5, 6, 7], [9]]
    logits = generator.prefill(rows, new_tokens=0)
    small = generator.memory()["kv_cache"]
    for column in ids(3, BLOCK + 5, 2):
        logits = generator.step(column)
        rows = [[*tokens, int(new)] for tokens, new in zip(rows, column, strict=True)]
    for row in range(2):
        np.testing.assert_allclose(logits[row], shared_toy.reference(rows[row])[-1], atol=TOLERANCE)
    assert generator.memory()["kv_cache"] == 2 * small
    assert small == 2 * 2 * BLOCK * 2 * 16 * 2 * 4  # batch, layers, tokens, kv heads, dim, K and V, bytes
    tokens = sum(map(len, rows))
    assert generator.memory()["kv_used"] == tokens * 2 * 2 * 16 * 2 * 4


def test_all_of_a_concatenated_cache_is_used(concat_toy):
    generator = load(concat_toy.path, threads=1)
    generator.prefill([[5, 6, 7]])
    generator.step([8])
    held = generator.memory()
    assert held["kv_used"] == held["kv_cache"] == 4 * 2 * (8 + 12) * 4  # tokens, layers, key and value, bytes


def test_capacity_is_whole_blocks_but_not_more_than_the_context():
    assert [round_up(n, 100) for n in (1, 64, 65, 100)] == [64, 64, 100, 100]


def test_logits_of_all_positions_equal_the_reference(decoder_toy):
    tokens = ids(4, 3, 17)
    logits = load(decoder_toy.path, threads=1).logits(tokens)
    assert logits.shape == (3, 17, decoder_toy.vocab_size) and logits.dtype == np.float32
    for row in range(3):
        np.testing.assert_allclose(logits[row], decoder_toy.reference(tokens[row]), atol=TOLERANCE)


def test_logits_with_lengths_ignore_the_padding(decoder_toy):
    tokens = ids(5, 2, 9)
    logits = load(decoder_toy.path, threads=1).logits(tokens, lengths=[9, 4])
    np.testing.assert_allclose(logits[0], decoder_toy.reference(tokens[0]), atol=TOLERANCE)
    np.testing.assert_allclose(logits[1, :4], decoder_toy.reference(tokens[1, :4]), atol=TOLERANCE)


def test_two_batches_in_flight_do_not_disturb_each_other(shared_toy):
    generator = load(shared_toy.path, threads=1)
    first, second = generator.decoder(8), generator.decoder(8)
    first.prefill([[5, 6]])
    second.prefill([[7, 8, 9]])
    np.testing.assert_allclose(first.step([10])[0], shared_toy.reference([5, 6, 10])[-1], atol=TOLERANCE)
    np.testing.assert_allclose(second.step([11])[0], shared_toy.reference([7, 8, 9, 11])[-1], atol=TOLERANCE)


def test_memory_is_zero_after_close_and_a_new_prefill_works(decoder_toy):
    generator = load(decoder_toy.path, threads=1)
    generator.prefill([[5, 6]])
    assert generator.memory()["kv_cache"] > 0
    generator.close()
    assert generator.memory()["kv_cache"] == 0
    np.testing.assert_allclose(generator.prefill([[5]])[0], decoder_toy.reference([5])[-1], atol=TOLERANCE)


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [[]],
        [[1], []],
        [[-1]],
        [[100_000]],
        [[1 << 70]],
        [[1.5]],
        ["text"],
        [[True]],
        [[1] * 161],
        "ab",
        None,
    ],
)
def test_prefill_refuses_what_is_no_batch_of_token_ids(shared_toy, prompt):
    with pytest.raises(RequestError):
        load(shared_toy.path, threads=1).prefill(prompt)


def test_step_refuses_bad_tokens_and_a_full_context(shared_toy):
    generator = load(shared_toy.path, threads=1)
    with pytest.raises(RequestError):
        generator.step([1])
    generator.prefill([[4] * 159])
    for tokens in ([1, 2], [-1], [100_000], [1.0], []):
        with pytest.raises(RequestError):
            generator.step(tokens)
    generator.step([4])
    with pytest.raises(RequestError, match="is full"):
        generator.step([4])


def test_unequal_prompts_are_refused_by_a_concatenated_batch(concat_toy):
    with pytest.raises(RequestError, match="equal length"):
        load(concat_toy.path, threads=1).prefill(PROMPTS)


@pytest.mark.parametrize("lengths", [[1], [0, 3], [3, 9], [1.0, 2.0]])
def test_logits_refuse_lengths_that_do_not_fit(shared_toy, lengths):
    with pytest.raises(RequestError):
        load(shared_toy.path, threads=1).logits(ids(6, 2, 5), lengths=lengths)


def test_a_manifest_that_contradicts_the_graph_is_refused(new_decoder):
    layer = {"kv_heads": 3, "key_dim": 16, "value_dim": 16}
    model = {"vocab_size": 300, "context_length": 160, "layers": [layer] * 2, "cache": "shared"}
    with pytest.raises(BundleError, match="not what the manifest says"):
        load(new_decoder(model=model).path)


def test_a_missing_layer_is_refused(new_decoder):
    layer = {"kv_heads": 2, "key_dim": 16, "value_dim": 16}
    model = {"vocab_size": 300, "context_length": 160, "layers": [layer] * 3, "cache": "shared"}
    with pytest.raises(BundleError, match=r"past\.2\.key"):
        load(new_decoder(model=model).path)


def test_an_impossible_cache_size_is_a_request_error(new_decoder):
    layer = {"kv_heads": 2, "key_dim": 16, "value_dim": 16}
    model = {"vocab_size": 300, "context_length": 1 << 30, "layers": [layer] * 2, "cache": "shared"}
    with pytest.raises(RequestError, match="not enough memory"):
        load(new_decoder(model=model).path).prefill([[1]] * 100_000, new_tokens=(1 << 30) - 1)
