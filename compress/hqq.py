"""HQQ: scale and zero point without any data, for errors of which a few large ones are borne.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023: minimise
``|| w - (q - z) s ||_p^p`` with p < 1 over z, by half-quadratic splitting. A second variable e stands for the
error; in turn it is shrunk towards the error that there is (equation 5), and z is set to the mean that fits
the codes to the weights without it (equation 6).

The paper keeps z real and s that of the range. MatMulNBits wants an integer z, and to that most of such moves
round back; so the ends of the range move too, s being one of a few, and the best of all that came up is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemini.compress.packing import storable

POWER = 0.7  # p, beta, its growth and the number of rounds are the paper's
_BETA, _GROWTH, _ROUNDS = 10.0, 1.01, 20
RANGES = (1.0, 0.93, 0.86, 0.79, 0.72)  # shares of the full range


def hqq_qparams(blocks: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point, both (B, 1, R), of blocks (B, size, R), never worse than those given.

    Worse is meant by ``sum |error|^p`` of a block.
    """
    top = float((1 << bits) - 1)
    best_scale, best_zero = scale, zero_point
    best = _loss(blocks / scale, zero_point, top) * scale.abs() ** POWER
    for share in RANGES:
        narrow = storable(scale * share)
        steps = blocks / narrow
        zero, beta = zero_point, _BETA
        for _ in range(_ROUNDS):
            codes = (steps + zero).round().clamp(0.0, top)
            error = shrink(steps - (codes - zero), beta)
            zero = (codes - (steps - error)).mean(1, keepdim=True)
            beta *= _GROWTH
        rounded = zero.round().clamp(0.0, top)
        loss = _loss(steps, rounded, top) * narrow.abs() ** POWER
        better = loss < best
        best_scale = torch.where(better, narrow, best_scale)
        best_zero = torch.where(better, rounded, best_zero)
        best = torch.minimum(loss, best)
    return best_scale, best_zero


def shrink(x: Tensor, beta: float) -> Tensor:
    """sign(x) max(|x| - |x|^(p - 1) / beta, 0): the generalised soft threshold of l_p (equation 5)."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(1e-8) ** (POWER - 1) / beta).clamp_min(0.0)


def _loss(steps: Tensor, zero_point: Tensor, top: float) -> Tensor:
    """sum |error|^p of weights in steps of their scale."""
    codes = (steps + zero_point).round().clamp(0.0, top)
    return (codes - zero_point - steps).abs().pow(POWER).sum(1, keepdim=True)
