"""GPTQ against its definition: the optimal brain surgeon's update, one feature at a time, with the inverse
Hessian eliminated step by step and no Cholesky factor anywhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gemini.compress.gptq import activation_order, gptq, inverse_factor, refit_scales
from gemini.compress.layers import Integers, rounded
from gemini.compress.quantize import quantize


def inputs(columns: int, rows: int = 400, seed: int = 0) -> torch.Tensor:
    """Correlated features of very different sizes, as those of a language model are."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    return mixed * torch.rand(columns, generator=generator).mul(3).exp()


def case(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = inputs(columns, seed=seed).double()
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    return weight, x.T @ x / len(x)


def slow_codes(weight, hessian, scales, zeros, block_size, bits, damping=0.01) -> np.ndarray:
    """Codes (rows, K) by elimination: after feature i is fixed, it leaves the inverse of what remains."""
    work, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    h[np.diag_indices_from(h)] += damping * h.diagonal().mean()
    inverse = np.linalg.inv(h)
    codes = np.zeros(work.shape, int)
    # Stable, as two features can be equally large.
    for feature in np.argsort(-hessian.diagonal().double().numpy(), kind="stable"):
        for row in range(len(work)):
            scale, zero = scales[row, feature // block_size], zeros[row, feature // block_size]
            code = min(max(round(work[row, feature] / scale), -zero), 2**bits - 1 - zero) + zero
            codes[row, feature] = code
            error = (work[row, feature] - (code - zero) * scale) / inverse[feature, feature]
            work[row] -= error * inverse[feature]
        column = inverse[:, feature].copy()
        inverse -= np.outer(column, column) / column[feature]
    return codes


@pytest.mark.parametrize("fit", ["moments", "nearest"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "rows", "columns", "block_size"), [(4, 24, 128, 32), (4, 8, 150, 64), (8, 16, 96, 16)]
)
def test_codes_equal_the_elimination_integer_for_integer(bits, rows, columns, block_size, symmetric, fit):
    weight, hessian = case(rows, columns)
    found = gptq(weight, hessian, bits=bits, block_size=block_size, symmetric=symmetric, fit=fit)
    scales = found.scales.double().numpy()
    # Scales and zero points are those of the weight as it was.
    plain = quantize(
        weight,
        bits=bits,
        block_size=block_size,
        symmetric=symmetric,
        fit=fit,
        importance=hessian.diagonal(),
    )
    assert torch.equal(found.scales, plain.scales)
    if symmetric:
        assert found.zero_points is None
        zeros = np.full(scales.shape, 2 ** (bits - 1))
    else:
        assert torch.equal(found.zero_points, plain.zero_points)
        zeros = unpacked(found.zero_points, bits)[:, : scales.shape[1]]
    expected = slow_codes(weight, hessian, scales, zeros, block_size, bits)
    codes = unpacked(found.qweight.flatten(1), bits)
    np.testing.assert_array_equal(codes[:, :columns], expected)
    # What pads the last block stands for zero.
    assert (codes[:, columns:] == zeros[:, -1:]).all()


def unpacked(packed: torch.Tensor, bits: int) -> np.ndarray:
    data = packed.numpy().astype(int)
    if bits == 8:
        return data
    return np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)


def test_the_output_error_falls_far_below_rounding(subtests):
    weight, hessian = case(64, 256)
    for bits in (4, 8):
        kinds = {
            "searched": quantize(
                weight, bits=bits, block_size=32, fit="moments", importance=hessian.diagonal()
            ),
            "gptq": gptq(weight, hessian, bits=bits, block_size=32),
        }
        errors = {}
        for name, made in kinds.items():
            wrong = (weight - made.dequantized()).double()
            errors[name] = float(torch.einsum("ri,ij,rj->", wrong, hessian, wrong))
        with subtests.test(bits=bits):
            # The features of this case are so correlated that most of the error can be moved away.
            assert errors["gptq"] < 0.5 * errors["searched"]


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    weight, hessian = case(16, 128)
    diagonal = torch.diag(hessian.diagonal())
    found = gptq(weight, diagonal, bits=4, block_size=32)
    plain = quantize(weight, bits=4, block_size=32, fit="moments", importance=hessian.diagonal())
    assert torch.equal(found.qweight, plain.qweight)


def test_a_feature_that_is_always_zero_is_rounded_to_nearest():
    weight, hessian = case(16, 64)
    hessian[5] = hessian[:, 5] = 0
    found = gptq(weight, hessian, bits=4, block_size=32, damping=0.01).dequantized()
    step = found[:, 5] - weight[:, 5]
    made = gptq(weight, hessian, bits=4, block_size=32)
    assert (step.abs() <= made.scales[:, 0].abs() * 0.5 + 1e-6).float().mean() > 0.9  # some are clipped


def test_a_damped_factor_is_that_of_the_inverse():
    _, hessian = case(1, 40)
    factor = inverse_factor(hessian, 0.05)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(40).double(), atol=1e-8, rtol=0)
    assert torch.equal(factor, factor.triu())


def test_large_features_come_first():
    hessian = torch.diag(torch.tensor([1.0, 3.0, 2.0, 3.0]))
    assert activation_order(hessian).tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("where", ["weight", "hessian"])
def test_values_that_are_not_finite_are_refused(where):
    weight, hessian = case(8, 32)
    (weight if where == "weight" else hessian)[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, hessian, bits=4, block_size=32)


def test_an_indefinite_hessian_is_refused():
    with pytest.raises(ValueError, match="positive definite"):
        gptq(torch.ones(8, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), bits=4, block_size=16)


@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_of_one_input_may_be_rounded_as_one_weight(symmetric, monkeypatch):
    weight, hessian = case(24, 96)
    options = {"bits": 4, "block_size": 32, "symmetric": symmetric}
    monkeypatch.setattr("gemini.compress.gptq._ROWS", 10)  # rows are taken in pieces too
    parts = gptq(weight, hessian, **options).split([16, 8])
    for part, rows in zip(parts, (weight[:16], weight[16:]), strict=True):
        alone = gptq(rows, hessian, **options)
        assert torch.equal(part.qweight, alone.qweight) and torch.equal(part.scales, alone.scales)
        assert part.columns == 96 and torch.equal(part.dequantized(), alone.dequantized())


@pytest.mark.parametrize(("columns", "symmetric"), [(128, True), (150, False)])
def test_refitted_scales_are_the_least_squares_of_their_codes(columns, symmetric):
    weight, hessian = case(12, columns)
    made = gptq(weight, hessian, bits=4, block_size=32, symmetric=symmetric)
    found = refit_scales(weight, hessian, made)
    assert torch.equal(found.qweight, made.qweight)
    assert found.zero_points is made.zero_points
    h = hessian.numpy() + 0.01 * np.diag(np.full(columns, hessian.diagonal().mean()))
    root = np.linalg.cholesky(h).T  # |root d|^2 = d H d
    stored, kept = made.dequantized().double().numpy(), 0
    for row in range(len(weight)):
        blocks = np.zeros((columns, made.scales.shape[1]))
        for feature in range(columns):
            blocks[feature, feature // 32] = stored[row, feature]
        gains, *_ = np.linalg.lstsq(root @ blocks, root @ weight[row].double().numpy())
        if torch.equal(found.scales[row], made.scales[row]):
            kept += 1
            continue
        # The ridge moves gains by less than a percent, float16 by less than a tenth of one.
        np.testing.assert_allclose(found.scales[row] / made.scales[row], gains, rtol=0.01)
    assert kept < len(weight) / 2


def test_refitting_never_loses_and_mostly_wins(subtests):
    weight, hessian = case(64, 256)
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(256)
    weight[3] = 0
    for bits in (4, 8):
        made = gptq(weight, hessian, bits=bits, block_size=32)
        found = refit_scales(weight, hessian, made, damping=0.0)
        errors = [
            torch.einsum("ri,ij,rj->r", wrong, hessian, wrong)
            for wrong in ((weight - each.dequantized()).double() for each in (made, found))
        ]
        with subtests.test(bits=bits):
            assert (errors[1] <= errors[0] * (1 + 1e-4)).all()
            assert errors[1].sum() < 0.99 * errors[0].sum()
            assert found.dequantized()[3].abs().max() == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_another_result_are_taken_as_they_are(symmetric):
    weight, hessian = case(24, 150)
    options = {"bits": 4, "block_size": 32, "symmetric": symmetric}
    made = gptq(weight, hessian, **options)
    again = gptq(weight, hessian, **options, like=made)
    assert torch.equal(again.qweight, made.qweight) and torch.equal(again.scales, made.scales)
    other = replace(made, scales=made.scales * 2)
    found = gptq(weight, hessian, **options, like=other)
    assert torch.equal(found.scales, other.scales) and not torch.equal(found.qweight, made.qweight)
    if not symmetric:
        assert torch.equal(found.zero_points, made.zero_points)


def test_a_second_round_with_refitted_scales_is_better_still():
    weight, hessian = case(64, 256)
    errors = []
    for rounds in (1, 2):
        made = None
        for _ in range(rounds):
            made = refit_scales(weight, hessian, gptq(weight, hessian, bits=4, block_size=32, like=made))
        wrong = (weight - made.dequantized()).double()
        errors.append(float(torch.einsum("ri,ij,rj->", wrong, hessian.double(), wrong)))
    assert errors[1] < 0.99 * errors[0]
    twice = rounded(weight, hessian, Integers(4, 32, symmetric=False, fit="moments"))
    assert torch.equal(twice.dequantized(), made.dequantized())
