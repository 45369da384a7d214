"""GPTQ: quantize a weight one input feature at a time, and let the features to come make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, algorithm 1, with activation order and static groups: features with the largest E[x^2] come
first, and scales and zero points are fixed before, from the weight as it was.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from gemini.compress.packing import storable
from gemini.compress.quantize import (
    Quantized,
    fit_qparams,
    pack_blocks,
    relative_mass,
    require_finite,
    split_blocks,
)

DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in the paper's section 3.3
_PANEL = 64  # features whose updates are gathered before the rest of the weight is touched
_STRIP = 8  # features of a panel whose updates are gathered before the rest of the panel is
_RIDGE = 1e-3  # what keeps gains of scales near 1, as a share of what their blocks put out
_NOTHING = torch.finfo(torch.float64).tiny
_UNKNOWNS = 1 << 21  # numbers of the normal equations that are held at a time, 16 MB
_ROWS = 4096  # of the weight, which are independent: a table of tokens has tens of thousands


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    block_size: int,
    symmetric: bool = False,
    fit: str = "moments",
    damping: float = DAMPING,
    like: Quantized | None = None,
    factor: Tensor | None = None,
) -> Quantized:
    """Quantize a float weight (rows, K) so that ``sum (w x - w' x)^2`` over the calibration inputs is small.

    Args:
        weight: float (rows, K).
        hessian: (K, K), E[x x^T] of the layer's inputs; a feature that is always zero is rounded to nearest.
        bits: 4 or 8.
        block_size: features that share a scale and, unless ``symmetric``, a zero point.
        fit: how those are found (``quantize.fit_qparams``), E[x^2] being the Hessian's diagonal.
        damping: added to the diagonal, as a share of its mean.
        like: another result of the same format, whose scales and zero points are taken in place of fitted
            ones.
        factor: ``ordered_factor`` of the Hessian where it is known; ``damping`` is in it then.

    Raises:
        ValueError: values that are not finite, or a Hessian that is not positive definite.
    """
    require_finite(weight)
    require_finite(hessian)
    order = activation_order(hessian)
    factor = ordered_factor(hessian, damping) if factor is None else factor
    mass = split_blocks(relative_mass(hessian.diagonal().float()).unsqueeze(0), block_size)
    pieces = weight.split(_ROWS)
    known = [None] * len(pieces) if like is None else like.split([len(rows) for rows in pieces])
    parts = [
        _quantize_rows(rows, mass, order, factor, bits, symmetric, fit, each)
        for rows, each in zip(pieces, known, strict=True)
    ]
    qweight, scales, zero_points = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Quantized(qweight, scales, None if symmetric else zero_points, bits, block_size, weight.shape[1])


def _quantize_rows(
    weight: Tensor,
    mass: Tensor,
    order: Tensor,
    factor: Tensor,
    bits: int,
    symmetric: bool,
    fit: str,
    like: Quantized | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, scales and packed zero points of some rows; ``mass`` is (blocks, size, 1)."""
    columns = weight.shape[1]
    blocks = split_blocks(weight.to(torch.float32), mass.shape[1])
    if like is None:
        scale, zero_point = fit_qparams(blocks, mass, bits, symmetric, fit)
    else:
        scale, zero_point = like.block_params()
    # One row a feature, as the columns of the weight are taken in turn.
    scales = scale.double().expand_as(blocks).flatten(0, 1)[:columns]
    zeros = zero_point.double().expand_as(blocks).flatten(0, 1)[:columns]
    codes = zero_point.expand_as(blocks).flatten(0, 1).clone()  # padding stands for 0
    codes[order] = _round_in_turn(weight.T.double()[order], factor, scales[order], zeros[order], bits).float()
    return pack_blocks(codes.reshape(blocks.shape), scale, zero_point, bits)


def refit_scales(weight: Tensor, hessian: Tensor, made: Quantized, damping: float = DAMPING) -> Quantized:
    """The same codes and zero points with the scales that suit them best.

    GPTQ fixes scales before it chooses codes. With codes fixed, the error (w - w') H (w - w')^T of a row is
    quadratic in the gains of its blocks' scales: with v_b what block b stands for, the normal equations are
    ``sum_c (v_b H v_c^T) g_c = v_b H w^T``. A row keeps its scales where rounding the new ones for storage
    leaves no gain.
    """
    measure = damped(hessian, damping).float()
    size = max(1, _UNKNOWNS // made.scales.shape[1] ** 2)
    pieces = zip(
        weight.float().split(size), made.dequantized().split(size), made.scales.split(size), strict=True
    )
    found = [_refit_rows(rows, stored, scales, measure, made.block_size) for rows, stored, scales in pieces]
    return replace(made, scales=torch.cat(found))


def _refit_rows(weight: Tensor, stored: Tensor, scales: Tensor, hessian: Tensor, block_size: int) -> Tensor:
    """Scales (rows, B) in place of those of ``stored``, what is stored of ``weight`` (rows, K)."""
    rows, columns = weight.shape
    count = -(-columns // block_size)
    padding = (0, count * block_size - columns)
    sums = weight.new_zeros(rows, count, count)
    for block, part in enumerate(stored.split(block_size, 1)):
        start = block * block_size  # the rest is known by symmetry
        products = (part @ hessian[start : start + block_size, start:]) * stored[:, start:]
        sums[:, block, block:] = functional.pad(products, padding).unflatten(1, (-1, block_size)).sum(-1)
    wanted = functional.pad((weight @ hessian) * stored, padding).unflatten(1, (-1, block_size)).sum(-1)
    left, right = (sums + sums.triu(1).mT).double(), wanted.double().unsqueeze(-1)
    ridge = _RIDGE * left.diagonal(dim1=1, dim2=2).mean(1).clamp_min(_NOTHING)[:, None, None]
    lower, failed = torch.linalg.cholesky_ex(left + ridge * torch.eye(count, dtype=left.dtype))
    gains = torch.cholesky_solve(right + ridge, lower)
    near = ((gains - 1).abs() < 0.5) & (failed == 0)[:, None, None]  # farther, codes would be others
    found = storable(scales * torch.where(near, gains, 1.0).squeeze(-1).float())
    # The error is g S g - 2 g w plus what no gain changes.
    errors = [g.mT @ (left @ g - 2 * right) for g in (_gains(found, scales), torch.ones_like(gains))]
    return torch.where((errors[0] < errors[1]).squeeze(-1), found, scales)


def _gains(scales: Tensor, before: Tensor) -> Tensor:
    return torch.where(before == 0, 1.0, scales / before).double().unsqueeze(-1)


def activation_order(hessian: Tensor) -> Tensor:
    """Features by falling E[x^2]; among equals the first comes first."""
    return hessian.diagonal().argsort(descending=True, stable=True)


def ordered_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """``inverse_factor`` of a Hessian with its features in activation order."""
    order = activation_order(hessian)
    return inverse_factor(hessian[order][:, order], damping)


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """A Hessian with ``damping`` of the mean of its diagonal added to that: float64 (K, K), a copy."""
    found = hessian.double().clone()
    diagonal = found.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[diagonal <= 0] = 1.0  # never seen in calibration: independent of all others
    return found


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper Cholesky factor U of the damped inverse, U^T U = H^-1: float64 (K, K).

    Row i holds what is left of H^-1 once the features before i are fixed, divided by the root of its pivot.
    ValueError if H is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping))
    if failed:
        raise ValueError("the Hessian is not positive definite")
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise ValueError("the Hessian cannot be inverted")
    return upper


def _round_in_turn(weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Codes (K, rows) of a weight (K, rows), features in the order given; all float64.

    Rounding feature i leaves e = (w_i - w'_i) / U_ii, and every later feature j moves by -U_ij e. Features of
    the same strip move at once, those of the same panel when the strip is done, all others when the panel is:
    the same sums in larger products.
    """
    weight, top = weight.clone(), float((1 << bits) - 1)
    lowest, highest = -zeros, top - zeros
    pivots = factor.diagonal().tolist()
    steps, count = torch.empty_like(weight), len(weight)
    for start in range(0, count, _PANEL):
        stop = min(start + _PANEL, count)
        errors = torch.empty_like(weight[start:stop])
        for first in range(start, stop, _STRIP):
            last = min(first + _STRIP, stop)
            for row in range(first, last):
                step, error = steps[row], errors[row - start]
                torch.div(weight[row], scales[row], out=step).round_()
                torch.clamp(step, lowest[row], highest[row], out=step)
                torch.addcmul(weight[row], step, scales[row], value=-1, out=error).div_(pivots[row])
                weight[row + 1 : last].addr_(factor[row, row + 1 : last], error, alpha=-1)
            made = errors[first - start : last - start]
            weight[last:stop].addmm_(factor[first:last, last:stop].T, made, alpha=-1)
        weight[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return steps.add_(zeros)
