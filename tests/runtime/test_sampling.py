"""Filters against slow loops and against transformers' logits processors."""

import numpy as np
import pytest

from gemini.errors import RequestError
from gemini.runtime.options import GenerationOptions, make_options
from gemini.runtime.sampling import (
    Sampler,
    apply_repetition_penalty,
    apply_temperature,
    draw,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    softmax,
)


def logits(seed, rows=4, vocab=97, scale=3.0):
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * scale).astype(np.float32)


def kept(array):
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in array]


def slow_top_p(row, p):
    weights = np.exp(row.astype(np.float64) - row.max())
    weights /= weights.sum()
    total, chosen = 0.0, []
    for token in sorted(range(len(row)), key=lambda i: -weights[i]):
        if chosen and total >= p:
            break
        chosen.append(token)
        total += weights[token]
    return sorted(chosen)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, scale):
    rows = logits(1, scale=scale)
    assert kept(keep_top_p(rows, p)) == [slow_top_p(row, p) for row in rows]


@pytest.mark.parametrize("k", [1, 5, 96])
def test_top_k_keeps_the_k_largest(k):
    rows = logits(2)
    assert kept(keep_top_k(rows, k)) == [sorted(np.argsort(-row)[:k].tolist()) for row in rows]


@pytest.mark.parametrize("k", [1, 40, 77, 78, 79, 4000])
def test_top_k_of_many_keeps_the_k_largest_and_their_equals(k):
    rows = np.round(logits(2, vocab=5000), 1)
    expected = [np.flatnonzero(row >= np.sort(row)[-k]).tolist() for row in rows]
    assert kept(keep_top_k(rows, k)) == expected


class Stream:
    """Says one number."""

    def __init__(self, number):
        self.number = number

    def random(self):
        return self.number


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_draw_is_the_inverse_of_what_weights_add_up_to(size, kind):
    rng = np.random.default_rng(size)
    weights = np.where(rng.random(size) < 0.3, 0, rng.random(size)).astype(kind)
    weights[size // 2 : size // 2 + 130] = 0
    weights[0] += weights.sum() == 0
    ends = np.cumsum(weights, dtype=np.float64)
    for number in (0.0, *rng.random(300), np.nextafter(1.0, 0.0)):
        found = draw(weights, Stream(number))
        assert weights[found] > 0
        assert ends[found] - weights[found] - 1e-9 <= number * ends[-1] <= ends[found] + 1e-9


@pytest.mark.parametrize("k", [0, 97, 1000])
def test_top_k_is_off_at_zero_and_beyond_the_vocabulary(k):
    rows = logits(3)
    assert keep_top_k(rows, k) is rows


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_min_p_is_relative_to_the_best(p):
    rows = logits(4)
    weights = softmax(rows)
    expected = [[i for i in range(97) if row[i] >= p * row.max()] for row in weights]
    assert kept(keep_min_p(rows, p)) == expected


def test_repetition_penalty_follows_the_sign():
    rows = np.array([[2.0, -2.0, 1.0]], np.float32)
    seen = np.array([[True, True, False]])
    np.testing.assert_array_equal(apply_repetition_penalty(rows, seen, 2.0), [[1.0, -4.0, 1.0]])


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures_stay_usable(temperature):
    probabilities = softmax(apply_temperature(logits(5), temperature))
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(-1), 1.0)


def test_all_filters_equal_transformers():
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    prompts = np.random.default_rng(0).integers(0, 97, (4, 6))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        options = GenerationOptions(
            do_sample=True,
            temperature=float(rng.uniform(0.3, 2)),
            top_k=int(rng.integers(1, 60)),
            top_p=float(rng.uniform(0.2, 0.99)),
            min_p=float(rng.uniform(0.001, 0.2)),
            repetition_penalty=float(rng.uniform(0.7, 1.8)),
        )
        rows = logits(seed + 100)
        theirs = torch.tensor(rows)
        for processor in (
            processors.RepetitionPenaltyLogitsProcessor(options.repetition_penalty),
            processors.TemperatureLogitsWarper(options.temperature),
            processors.TopKLogitsWarper(options.top_k),
            processors.TopPLogitsWarper(options.top_p),
            processors.MinPLogitsWarper(options.min_p),
        ):
            theirs = processor(torch.tensor(prompts), theirs)
        seen = np.zeros(rows.shape, bool)
        np.put_along_axis(seen, prompts, True, axis=1)
        ours = filter_logits(apply_repetition_penalty(rows, seen, options.repetition_penalty), options)
        # Ours are shifted by the row maximum, so probabilities are compared; both sides compute in float32.
        np.testing.assert_allclose(softmax(ours), theirs.softmax(-1).numpy(), atol=1e-6)
        assert kept(ours) == kept(theirs.numpy())


def test_samples_follow_the_distribution():
    row = np.log(np.array([[0.5, 0.3, 0.0001, 0.1999]], np.float32))
    rows = row.repeat(1000, axis=0)
    sampler = Sampler(GenerationOptions(do_sample=True, seed=1), [[0]] * 1000, 4)
    drawn = np.concatenate([sampler.choose(rows) for _ in range(20)])
    share = np.bincount(drawn, minlength=4) / 20_000
    # Three standard deviations of a share of one half in 20,000 draws.
    np.testing.assert_allclose(share, [0.5, 0.3, 0.0001, 0.1999], atol=0.011)


def test_removed_tokens_are_never_drawn():
    rows = logits(6, rows=500, scale=0.1)
    sampler = Sampler(GenerationOptions(do_sample=True, top_k=3, seed=2), [[0]] * 500, 97)
    best = np.argsort(-rows, axis=1)[:, :3]
    for _ in range(5):
        assert (sampler.choose(rows)[:, None] == best).any(axis=1).all()


def test_a_batch_row_draws_what_a_single_run_with_its_seed_draws():
    rows = [logits(seed, rows=3) for seed in range(10)]
    batch = Sampler(GenerationOptions(do_sample=True, seed=40), [[0]] * 3, 97)
    drawn = np.stack([batch.choose(step) for step in rows])
    for row in range(3):
        single = Sampler(GenerationOptions(do_sample=True, seed=40 + row), [[0]], 97)
        assert [int(single.choose(step[row : row + 1])[0]) for step in rows] == drawn[:, row].tolist()


def test_greedy_takes_the_first_of_equal_logits_and_remembers_for_the_penalty():
    rows = np.array([[1.0, 3.0, 3.0, 2.9]], np.float32)
    assert Sampler(GenerationOptions(), [[0]], 4).choose(rows).tolist() == [1]
    sampler = Sampler(GenerationOptions(repetition_penalty=1.1), [[0]], 4)
    assert [int(sampler.choose(rows)[0]) for _ in range(3)] == [1, 2, 3]


def test_temperature_zero_is_greedy():
    rows = logits(7)
    sampler = Sampler(GenerationOptions(do_sample=True, temperature=0.0), [[0]] * 4, 97)
    assert sampler.choose(rows).tolist() == rows.argmax(-1).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": [5]},
        {"beams": 4},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(RequestError):
        make_options({}, options)


def test_defaults_fill_what_is_not_given():
    defaults = {"do_sample": True, "temperature": 0.2, "top_k": 50, "top_p": None}
    options = make_options(defaults, {"top_k": 7, "temperature": None, "stop": "end"})
    assert options == GenerationOptions(do_sample=True, temperature=0.2, top_k=7, stop=("end",))


def test_a_sampling_option_switches_sampling_on_unless_told_otherwise():
    assert make_options({}, {"temperature": 0.7}).do_sample
    assert not make_options({}, {"temperature": 0.7, "do_sample": False}).do_sample
    assert make_options({}, {}).greedy
