"""HQQ against a loop over the paper's equations, and what it is for: weights with a few large values."""

import numpy as np
import pytest
import torch
from small_models import logits_of, make_llama, make_windows, run

from gemini.compress.hqq import POWER, RANGES, hqq_qparams, shrink
from gemini.compress.quantize import choose_qparams, quantize, split_blocks
from gemini.compress.specs import QuantizeInt4
from gemini.errors import RecipeError


def heavy_tailed(rows=6, columns=64, seed=0):
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.standard_t(3, (rows, columns)).astype(np.float32))


def slow_block(block, full, start, top):
    """Scale and zero point of one block, value by value, in float64."""

    def loss(scale, zero):
        return sum(abs((code(w, scale, zero, top) - zero) * scale - w) ** POWER for w in block)

    best = (full, start)
    for share in RANGES:
        scale, zero, beta = float(np.float16(full * share)), start, 10.0
        for _ in range(20):
            moved = []
            for w in block:
                error = w / scale - (code(w, scale, zero, top) - zero)
                size = max(abs(error), 1e-8)
                kept = np.sign(error) * max(abs(error) - size ** (POWER - 1) / beta, 0)
                moved.append(code(w, scale, zero, top) - (w / scale - kept))
            zero, beta = float(np.mean(moved)), beta * 1.01
        found = (scale, min(max(float(np.round(zero)), 0.0), top))
        if loss(*found) < loss(*best):
            best = found
    return best


def code(w, scale, zero, top):
    return min(max(float(np.round(w / scale + zero)), 0.0), top)


@pytest.mark.parametrize("bits", [4, 8])
def test_scale_and_zero_point_are_those_of_the_loop(bits):
    weight = heavy_tailed(12, 32)
    start = choose_qparams(split_blocks(weight, 32), bits, symmetric=False)
    found = [values[0, 0].numpy() for values in hqq_qparams(split_blocks(weight, 32), *start, bits)]
    full, zeros = (values[0, 0].tolist() for values in start)
    expected = [
        slow_block(row.double().tolist(), full[number], zeros[number], 2.0**bits - 1)
        for number, row in enumerate(weight)
    ]
    same = np.isclose(np.transpose(expected), found, rtol=1e-5).all(0)
    assert same.mean() >= 0.9  # a tie of two roundings may fall either way in float32
    assert bits == 8 or not np.allclose(found[0], full)


def test_the_threshold_is_the_papers():
    x = torch.tensor([-3.0, -0.5, 0.9, 4.0])
    torch.testing.assert_close(shrink(x, 20.0), x - x.sign() / 20 * x.abs() ** (POWER - 1))
    assert float(shrink(torch.tensor([0.001]), 1.0)) == 0


def test_the_sum_of_powers_is_never_larger_than_that_of_rounding_to_nearest():
    weight = heavy_tailed(32, 256, seed=1)

    def loss(fit):
        made = quantize(weight, bits=4, block_size=64, fit=fit).dequantized()
        return (made - weight).abs().pow(POWER).reshape(32, 4, 64).sum(-1)

    plain, found = loss("nearest"), loss("hqq")
    assert bool((found <= plain * (1 + 1e-5)).all()) and float(found.sum()) < 0.99 * float(plain.sum())


def test_a_recipe_can_ask_for_it_and_needs_no_text():
    model, windows = make_llama(), make_windows()
    (report,) = run(model, QuantizeInt4(block_size=32, fit="hqq"))
    assert report.calibration_windows == 0 and bool(logits_of(model, windows).isfinite().all())
    for options in ({"fit": "best"}, {"fit": "hqq", "symmetric": True}):
        with pytest.raises(RecipeError, match="`fit` is"):
            QuantizeInt4(**options)
