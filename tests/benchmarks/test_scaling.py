"""Costs as functions of size and context: the fit against known terms and against all subsets of terms."""

from itertools import chain, combinations

import numpy as np
import pytest

from gemini.benchmarks.resources import last_level_cache
from gemini.benchmarks.scaling import Measurement, Shape, fit, fits, llama_shape, predict
from gemini.runtime import kernels


def made():
    """Shapes of growing models, measured without noise by the costs that are to be found."""
    measured = []
    for n in range(4):
        shape = Shape(f"m{n}", 8 + 8 * n, int(3e7 * 2**n), int(3.2e7 * 2**n), 4096 * (n + 1))
        cache = {c: c * shape.cache_bytes for c in (128, 1024)}
        steps = {
            c: 0.5 + 0.1 * shape.layers + 90 * shape.weight_bytes / 1e9 + 40 * size / 1e9
            for c, size in cache.items()
        }
        peaks = {c: 50 + 1.2 * shape.bundle_bytes / 1e6 + size / 1e6 for c, size in cache.items()}
        measured.append(Measurement(shape, 300 + 2000 * shape.bundle_bytes / 1e9, steps, peaks))
    return measured


def test_known_costs_are_found_and_extrapolated():
    found = fits(made())
    assert list(found["step_ms"].terms.values()) == pytest.approx([0.5, 0.1, 90, 40], rel=1e-6)
    assert list(found["load_ms"].terms.values()) == pytest.approx([300, 2000])
    assert list(found["peak_mb"].terms.values()) == pytest.approx([50, 1.2, 1.0])
    assert max(one.worst for one in found.values()) < 1e-9
    said = predict(found, Shape("8b", 32, 5_000_000_000, 6_000_000_000, 262_144), 2048)
    assert said["step_ms"] == pytest.approx(0.5 + 3.2 + 450 + 40 * 2048 * 262_144 / 1e9)
    assert said["peak_mb"] == pytest.approx(50 + 7200 + 2048 * 0.262144)


def test_models_that_stay_in_the_cache_do_not_count_for_a_tokens_time():
    small = Shape("small", 4, 10_000_000, 11_000_000, 1024)
    quick = Measurement(small, 322, {c: 0.1 for c in (128, 1024)}, {c: 63.2 + c * 1e-3 for c in (128, 1024)})
    assert fits([quick, *made()], cached=10_000_000)["step_ms"].worst < 1e-9
    assert fits([quick, *made()], cached=9_999_999)["step_ms"].worst > 0.1
    too_few = fits([quick, *made()[1:]], cached=10_000_000)
    assert too_few["step_ms"].worst > 0.1


def test_the_largest_cache_has_a_size():
    assert last_level_cache() == 0 or last_level_cache() >= 1 << 15


def test_no_cost_is_negative_and_none_that_is_allowed_fits_better():
    rng = np.random.default_rng(1)
    for _ in range(20):
        terms = rng.uniform(0.5, 5, (6, 3))
        values = np.abs(terms @ rng.normal(1, 2, 3)) + 0.5
        found = fit(
            [(dict(zip("abc", row, strict=True)), value) for row, value in zip(terms, values, strict=True)]
        )
        assert min(found.terms.values()) >= 0
        relative = terms / values[:, None]
        best = np.inf
        for kept in chain.from_iterable(combinations(range(3), n) for n in range(1, 4)):
            solved = np.linalg.lstsq(relative[:, kept], np.ones(6), rcond=None)[0]
            if (solved >= 0).all():
                best = min(best, np.square(relative[:, kept] @ solved - 1).sum())
        error = np.square(relative @ np.array(list(found.terms.values())) - 1).sum()
        assert error == pytest.approx(best)


@pytest.mark.parametrize("own", [False, True])
def test_a_llamas_bytes_are_those_of_its_matrices(own, monkeypatch):
    monkeypatch.setattr(kernels, "wanted", lambda: own)
    shape = llama_shape("135m", 576, 1536, 30, 192, 49_152, tied=True)
    linear = sum(
        rows * columns * 4 / 8 + rows * columns / 64 * (2 + 0.5)
        for rows, columns in (
            (576, 576),
            (192, 576),
            (192, 576),
            (576, 576),
            (1536, 576),
            (1536, 576),
            (576, 1536),
        )
    )
    assert shape.weight_bytes == int(30 * linear + 49_152 * 576 * (1 + 2 / 64)) == shape.bundle_bytes
    assert shape.cache_bytes == 30 * (192 + 192) * (2 if own else 4)
