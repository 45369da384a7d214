"""Ranges of activations against slow loops, and against samples whose answer is known."""

import math

import numpy as np
import pytest
import torch

from gemini.compress.ranges import (
    Codes,
    clipping_divergence,
    codes_of,
    count_values,
    entropy_range,
    percentile_range,
)


def samples(seed: int = 0, count: int = 20_000) -> np.ndarray:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(count)
    return np.where(x > 0, x, 0.1 * x).astype(np.float32)  # lopsided, as after an activation function


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.25, 3.0), (-4.0, -0.5), (-0.1, 0.1)])
def test_codes_hold_zero_exactly_and_the_range_to_half_a_step(low, high):
    codes = codes_of(low, high)
    assert 0 <= codes.zero_point <= 255
    x = np.linspace(min(low, 0), max(high, 0), 1001)
    found = (np.clip(np.rint(x / codes.scale) + codes.zero_point, 0, 255) - codes.zero_point) * codes.scale
    assert np.abs(found - x).max() <= codes.scale * 1.0001  # the zero point is rounded: half a step more
    assert np.abs(found - x)[5:-5].max() <= codes.scale * 0.5001 or (high - low) / 1000 * 5 < codes.scale
    assert codes_of(0.0, 0.0) == Codes(1.0, 0)


def test_counts_are_numpys():
    x = samples()
    counts = count_values(torch.from_numpy(x), float(x.min()), float(x.max()), bins=50)
    expected, _ = np.histogram(x.astype(np.float64), bins=50, range=(float(x.min()), float(x.max())))
    assert counts.sum() == len(x) and np.abs(counts - expected).sum() <= 4  # values on the edge of two bins
    assert count_values(torch.zeros(7), 0.0, 0.0, bins=5).tolist() == [7, 0, 0, 0, 0]


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_percentiles_are_those_of_the_samples_to_a_bin(percent):
    x = samples()
    low, high = float(x.min()), float(x.max())
    found = percentile_range(count_values(torch.from_numpy(x), low, high), low, high, percent)
    spared = int(len(x) * (100 - percent) / 200 + 1e-6)
    expected = np.sort(x)[[spared, -1 - spared]]  # the outermost values that may not be left out
    assert (np.abs(found - expected) <= (high - low) / 4096).all()
    assert found[0] <= expected[0] and expected[1] <= found[1] + 1e-6


def test_all_values_are_kept_at_100_percent():
    counts = np.array([3, 0, 5, 1])
    assert percentile_range(counts, -1.0, 3.0, 100.0) == (-1.0, 3.0)


def slow_divergence(counts: list[int], start: int, stop: int, levels: int) -> float:
    """KL(P || Q) as in Migacz's slides, value by value."""
    kept = counts[start:stop]
    p = [float(count) for count in kept]
    p[0] += sum(counts[:start])
    p[-1] += sum(counts[stop:])
    used = min(levels, len(kept))
    groups: dict[int, list[int]] = {}
    for place in range(len(kept)):
        groups.setdefault(place * used // len(kept), []).append(place)
    q = [0.0] * len(kept)
    for places in groups.values():
        filled = [place for place in places if p[place] > 0]
        for place in filled:
            q[place] = sum(kept[other] for other in places) / len(filled)
    total_p, total_q = sum(p), sum(kept)
    divergence = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            divergence += a / total_p * math.log(a / total_p / max(b / total_q, 1e-9))
    return divergence


def test_the_divergence_is_that_of_a_slow_loop():
    counts = np.random.default_rng(1).poisson(np.exp(-(np.linspace(-3, 4, 90) ** 2)) * 40)
    for start, stop, levels in ((0, 90, 16), (20, 61, 16), (30, 38, 16), (0, 45, 7)):
        expected = slow_divergence(counts.tolist(), start, stop, levels)
        assert clipping_divergence(counts, start, stop, levels) == pytest.approx(expected, rel=1e-9)


def test_the_entropy_range_is_the_best_of_all_thresholds():
    counts = np.random.default_rng(2).poisson(np.exp(-np.abs(np.linspace(-1, 6, 100)) * 1.5) * 300)
    low, high, levels = -1.0, 6.0, 8
    zero = int(1 / 7 * 100)
    losses = {}
    for reach in range(levels // 2, 100 - zero):
        window = (max(0, zero - reach), min(100, zero + reach + 1))
        losses[window] = slow_divergence(counts.tolist(), *window, levels)
    start, stop = min(losses, key=lambda window: losses[window])
    assert stop < 100  # the tail is not worth its codes
    found = entropy_range(counts, low, high, levels)
    np.testing.assert_allclose(found, (low + start * 0.07, low + stop * 0.07), rtol=1e-9)


def test_entropy_clips_an_outlier_and_keeps_an_even_distribution():
    x = torch.from_numpy(np.append(np.random.default_rng(3).standard_normal(50_000), 60.0))
    low, high = entropy_range(count_values(x, float(x.min()), 60.0), float(x.min()), 60.0)
    assert low < -3 and 3 < high < 15
    even = torch.linspace(-1, 3, 100_000, dtype=torch.float64)
    assert entropy_range(count_values(even, -1.0, 3.0), -1.0, 3.0) == pytest.approx((-1.0, 3.0), abs=2e-3)
    assert entropy_range(np.zeros(16, np.int64), 0.0, 0.0) == (0.0, 0.0)
