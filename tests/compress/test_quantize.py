"""Quantization arithmetic against slow loops that follow the operator specification literally."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.compress.modules import FP4_CODES, NF4_CODES, Bnb4Linear
from gemini.compress.packing import pack_4bit, unpack_4bit
from gemini.compress.quantize import (
    choose_qparams,
    encode,
    quantize,
    quantize_bnb4,
    quantize_channels,
    search_qparams,
    split_blocks,
    weighted_error,
)


def make_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def make_importance(columns: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(seed)) ** 4 + 1e-3


def slow_dequantize(q, columns: int) -> np.ndarray:
    """(code - zero point) * scale, nibble by nibble, as the MatMulNBits specification words it."""
    rows = q.scales.shape[0]
    out = np.zeros((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            block, inside = divmod(column, q.block_size)
            if q.bits == 8:
                code = int(q.qweight[row, block, inside])
                zero = 128 if q.zero_points is None else int(q.zero_points[row, block])
            else:
                code = int(q.qweight[row, block, inside // 2]) >> (4 * (inside % 2)) & 15
                packed = 0x88 if q.zero_points is None else int(q.zero_points[row, block // 2])
                zero = packed >> (4 * (block % 2)) & 15
            out[row, column] = np.float32(code - zero) * np.float32(q.scales[row, block])
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("fit", ["moments", "nearest"])
def test_dequantized_equals_the_loop_over_the_packed_bytes(bits, symmetric, fit):
    weight = make_weight(5, 83)  # 83: a ragged tail, and an odd number of blocks
    made = quantize(
        weight, bits=bits, block_size=32, symmetric=symmetric, fit=fit, importance=make_importance(83)
    )
    # Exact: both multiply the same two float32 numbers.
    np.testing.assert_array_equal(made.dequantized().numpy(), slow_dequantize(made, 83))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_to_nearest_equals_a_loop(bits, symmetric):
    weight = make_weight(4, 64)
    made = quantize(weight, bits=bits, block_size=16, symmetric=symmetric).dequantized()
    top = 2**bits - 1
    for row in range(4):
        for block in range(4):
            values = weight[row, block * 16 : block * 16 + 16].double()
            if symmetric:
                scale, zero = float(values[values.abs().argmax()]) / -(2 ** (bits - 1)), 2 ** (bits - 1)
                scale = float(np.float16(scale))
            else:
                low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
                scale = float(np.float16((high - low) / top))
                zero = round(-low / scale)
            for column, value in enumerate(values.tolist()):
                code = min(max(round(value / scale) + zero, 0), top)
                # 1e-5 relative: the loop works in float64, and no value of this seed sits on a rounding edge.
                got = float(made[row, block * 16 + column])
                assert got == pytest.approx((code - zero) * scale, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("bits", [4, 8])
def test_error_inside_the_range_is_at_most_half_a_step(bits):
    blocks = split_blocks(make_weight(7, 96), 32)
    scale, zero = choose_qparams(blocks, bits, symmetric=False)
    low, high = -zero * scale, ((1 << bits) - 1 - zero) * scale
    inside = (blocks >= low) & (blocks <= high)
    error = (encode(blocks, scale, zero, bits) * scale - blocks).abs()
    # 1e-5 of a step for the float32 division and product.
    assert bool((error <= scale.abs() * (0.5 + 1e-5))[inside].all())
    assert inside.float().mean() > 0.95


@pytest.mark.parametrize("symmetric", [True, False])
def test_weighted_error_equals_a_loop(symmetric):
    blocks, mass = split_blocks(make_weight(3, 48), 16), split_blocks(make_importance(48)[None], 16)
    scale, zero = choose_qparams(blocks, 4, symmetric)
    got = weighted_error(blocks, mass, scale, zero, 4)
    for block in range(3):
        for row in range(3):
            s, z, total = float(scale[block, 0, row]), float(zero[block, 0, row]), 0.0
            for j in range(16):
                w = float(blocks[block, j, row])
                code = min(max(round(w / s) + z, 0), 15)
                total += float(mass[block, j, 0]) * (w - (code - z) * s) ** 2
            # 1e-4: sixteen float32 squares against float64.
            assert float(got[block, 0, row]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_search_is_never_worse_than_round_to_nearest(symmetric, bits):
    blocks, mass = split_blocks(make_weight(40, 128), 64), split_blocks(make_importance(128)[None], 64)
    found = weighted_error(blocks, mass, *search_qparams(blocks, mass, bits, symmetric), bits)
    plain = weighted_error(blocks, mass, *choose_qparams(blocks, bits, symmetric), bits)
    assert bool((found <= plain).all())


@pytest.mark.parametrize(("symmetric", "slack"), [(True, 1.05), (False, 1.06)])
def test_search_comes_near_the_best_of_a_dense_scan(symmetric, slack):
    """An independent exhaustive scan (every zero point, 200 signed scales) bounds what any search could
    reach.

    ``slack``: the search must lie within 5 % (symmetric) or 6 % of the scan's mean error, twice what its
    grid is known to lose; round to nearest is 20 % and more above it.
    """
    weight, importance = make_weight(48, 64, seed=5).double(), make_importance(64).double()
    made = quantize(
        weight.float(), bits=4, block_size=64, symmetric=symmetric, fit="moments", importance=importance
    )
    found = ((made.dequantized().double() - weight).square() * importance).sum(1)
    best = torch.full((48,), math.inf, dtype=torch.float64)
    largest = weight.abs().amax(1, keepdim=True)
    for zero in (8,) if symmetric else range(16):
        for step in torch.linspace(-0.2, 0.2, 201, dtype=torch.float64):
            if step == 0:
                continue
            scale = largest * step
            codes = (weight / scale + zero).round().clamp(0, 15)
            best = torch.minimum(best, (((codes - zero) * scale - weight).square() * importance).sum(1))
    plain = quantize(weight.float(), bits=4, block_size=64, symmetric=symmetric).dequantized().double()
    rounding = ((plain - weight).square() * importance).sum(1)
    assert found.mean() <= slack * best.mean()
    assert rounding.mean() >= 1.2 * best.mean()


def test_all_zero_and_constant_blocks_are_exact_and_finite():
    weight = torch.zeros(3, 64)
    weight[1] = 0.25
    weight[2] = -3.0
    for symmetric in (True, False):
        for fit in ("moments", "nearest"):
            made = quantize(weight, bits=4, block_size=32, symmetric=symmetric, fit=fit)
            assert bool(torch.isfinite(made.scales).all()) and bool((made.scales != 0).all())
            # The scale has the 11 bits of a float16.
            torch.testing.assert_close(made.dequantized(), weight, rtol=2**-11, atol=0)


def test_a_huge_outlier_does_not_make_codes_wrap():
    weight = make_weight(2, 64)
    weight[0, 3], weight[1, 40] = 1e6, -1e6
    for symmetric in (True, False):
        for fit in ("moments", "nearest"):
            got = quantize(weight, bits=4, block_size=64, symmetric=symmetric, fit=fit).dequantized()
            # The outlier carries all the error, so it must be met within a step of 1/30 of the range.
            assert got[0, 3] == pytest.approx(1e6, rel=0.04)
            assert got[1, 40] == pytest.approx(-1e6, rel=0.04)


def test_padding_of_a_ragged_tail_dequantizes_to_zero():
    made = quantize(make_weight(4, 40), bits=4, block_size=32, fit="moments")
    codes = unpack_4bit(made.qweight, 32)
    zeros = unpack_4bit(made.zero_points, 2)
    assert bool((codes[:, 1, 8:] == zeros[:, 1:]).all())


def test_symmetric_scale_is_signed_so_the_largest_value_is_exact():
    weight = torch.tensor([[0.8] + [0.01] * 15, [-0.8] + [0.01] * 15])
    made = quantize(weight, bits=4, block_size=16, symmetric=True)
    assert made.scales[0, 0] < 0 < made.scales[1, 0]
    # -8 * (0.8 / -8), of which the scale is rounded to the 11 bits of a float16.
    np.testing.assert_allclose(made.dequantized()[:, 0].numpy(), weight[:, 0].numpy(), rtol=2**-11)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("symmetric", "fit"), [(True, "moments"), (False, "moments"), (False, "hqq"), (False, "nearest")]
)
def test_scales_are_numbers_that_a_float16_holds(bits, symmetric, fit):
    made = quantize(make_weight(8, 96), bits=bits, block_size=32, symmetric=symmetric, fit=fit)
    halves = made.scales.numpy().astype(np.float16)
    np.testing.assert_array_equal(halves.astype(np.float32), made.scales.numpy())
    codes = made.qweight.numel() + (0 if symmetric else made.zero_points.numel())
    assert made.nbytes() == codes + 2 * halves.size


def test_scales_beyond_a_float16_stay_float32():
    weight = make_weight(8, 32)
    weight[0] *= 1e-6
    made = quantize(weight, bits=4, block_size=32)
    assert made.nbytes() == made.qweight.numel() + made.zero_points.numel() + 4 * made.scales.numel()
    np.testing.assert_allclose(
        made.dequantized()[0].numpy(), weight[0].numpy(), atol=float(made.scales[0, 0]) / 2
    )


def test_ignored_features_do_not_pull_the_scale():
    weight = make_weight(8, 64)
    weight[:, 0] = 5.0
    importance = torch.ones(64)
    importance[0] = 0.0
    made = quantize(weight, bits=4, block_size=64, fit="moments", importance=importance)
    error = (made.dequantized() - weight)[:, 1:].square().mean()
    plain = (quantize(weight, bits=4, block_size=64).dequantized() - weight)[:, 1:].square().mean()
    # Round to nearest spends its range on the outlier; the grid goes down to half of that range, 1/4 of the
    # error.
    assert error < 0.25 * plain


def test_importance_of_all_zeros_and_none_are_accepted():
    weight = make_weight(4, 64)
    a = quantize(weight, bits=4, block_size=32, fit="moments", importance=torch.zeros(64))
    b = quantize(weight, bits=4, block_size=32, fit="moments")
    # 1e-5: the same sums, times a floor instead of one.
    torch.testing.assert_close(a.dequantized(), b.dequantized(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value):
    weight = make_weight(2, 32)
    weight[1, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize(weight, bits=4, block_size=32)
    with pytest.raises(ValueError, match="not finite"):
        quantize_channels(weight)


def test_row_chunks_do_not_change_the_result(monkeypatch):
    weight, importance = make_weight(37, 96), make_importance(96)
    whole = quantize(weight, bits=4, block_size=32, fit="moments", importance=importance)
    monkeypatch.setattr("gemini.compress.quantize._CHUNK", 96 * 5)
    parts = quantize(weight, bits=4, block_size=32, fit="moments", importance=importance)
    # Sums may be split differently inside a matrix product, so equality is asked of the values, not the bits.
    torch.testing.assert_close(whole.dequantized(), parts.dequantized(), rtol=1e-4, atol=1e-6)


def test_same_input_gives_identical_bytes():
    weight, importance = make_weight(64, 100), make_importance(100)
    first, second = (
        quantize(weight.clone(), bits=4, block_size=64, fit="moments", importance=importance)
        for _ in range(2)
    )
    for name in ("qweight", "scales", "zero_points"):
        assert getattr(first, name).numpy().tobytes() == getattr(second, name).numpy().tobytes()


@given(st.integers(1, 33), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_packing_round_trips_and_puts_the_even_index_low(count, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 16, (3, count), dtype=np.uint8))
    packed = pack_4bit(codes, pad=8)
    assert packed.shape == (3, (count + 1) // 2)
    assert torch.equal(unpack_4bit(packed, count), codes)
    assert torch.equal(packed[:, 0] & 15, codes[:, 0])
    if count % 2:
        assert bool((packed[:, -1] >> 4 == 8).all())


def test_channel_codes_are_within_half_a_step_and_never_minus_128():
    weight = make_weight(9, 50)
    weight[4] = 0
    codes, scales = quantize_channels(weight)
    assert codes.dtype == torch.int8 and int(codes.min()) >= -127
    error = (codes.float() * scales[:, None] - weight).abs()
    assert bool((error <= scales[:, None] * (0.5 + 1e-5)).all())  # 1e-5: float32 division
    assert bool((codes[4] == 0).all())


@pytest.mark.parametrize(("kind", "codes", "number"), [("nf4", NF4_CODES, 1), ("fp4", FP4_CODES, 0)])
@pytest.mark.parametrize("shape", [(6, 64), (5, 51)])
def test_bnb4_matches_bitsandbytes_own_dequantization(kind, codes, number, shape):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = make_weight(*shape)
    packed, absmax = quantize_bnb4(weight, 64, kind)
    assert packed.shape == ((weight.numel() + 1) // 2,) and absmax.shape == (-(-weight.numel() // 64),)
    ours = Bnb4Linear(shape[1], shape[0], packed, absmax, 64, number).dequantized()
    reference = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type=kind))
    # 1e-6: the library's table is the same list in float32.
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-8)
    assert len(set(codes)) in (15, 16)
