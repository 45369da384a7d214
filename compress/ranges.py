"""Ranges of activations for 8 bits: what part of a histogram gets the 256 codes.

    counts = count_values(x, low, high)                    # summed over all calibration
    low, high = entropy_range(counts, low, high)
    codes = codes_of(low, high)                            # scale and zero point

A range that holds every value wastes codes on a few outliers; a narrower one clips those and rounds all the
others more finely. Pure functions; `gemini.compress.static` feeds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEVELS = 256
# 16 bins a code at the full range: fewer say nothing about narrow ranges, more stay empty.
BINS = 4096
_CANDIDATES = 120
# Probability of a bin that the codes cannot reach: the divergence of a clipped outlier stays finite.
_UNREACHED = 1e-9


@dataclass(frozen=True)
class Codes:
    """uint8 code q stands for (q - zero_point) * scale; 0.0 has a code of its own."""

    scale: float
    zero_point: int


def codes_of(low: float, high: float) -> Codes:
    """The codes of a range, widened to hold 0; an empty range gets scale 1."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / (LEVELS - 1)))
    if scale == 0.0:
        return Codes(1.0, 0)
    return Codes(scale, int(np.clip(round(-low / scale), 0, LEVELS - 1)))


def count_values(values: Tensor, low: float, high: float, bins: int = BINS) -> NDArray[np.int64]:
    """How many values lie in each of ``bins`` equal parts of [low, high]: int64 (bins,).

    Values outside belong to the first and the last part.
    """
    if high <= low:
        counts = np.zeros(bins, np.int64)
        counts[0] = values.numel()
        return counts
    places = ((values.detach().flatten().double() - low) * (bins / (high - low))).long().clamp_(0, bins - 1)
    found: NDArray[np.int64] = torch.bincount(places, minlength=bins).numpy()
    return found


def percentile_range(
    counts: NDArray[np.int64], low: float, high: float, percent: float
) -> tuple[float, float]:
    """The shortest range of whole bins that leaves at most (100 - percent) / 2 % of the values out at each
    end."""
    width = (high - low) / len(counts)
    spared = int(counts.sum() * (100.0 - percent) / 200.0 + 1e-6)  # 10 and not 9 where float64 says 9.999…
    first = int(np.searchsorted(np.cumsum(counts), spared, side="right"))
    last = int(np.searchsorted(np.cumsum(counts[::-1]), spared, side="right"))
    if first + last >= len(counts):
        return low, high
    return low + first * width, high - last * width


def entropy_range(
    counts: NDArray[np.int64], low: float, high: float, levels: int = LEVELS
) -> tuple[float, float]:
    """The range whose codes tell most about the values: the least divergence KL(values || codes).

    Candidates keep |x| below a threshold; the codes spread over what of [low, high] is left. Migacz, "8-bit
    Inference with TensorRT" (GTC 2017), where the histogram is of |x| and the codes are symmetric.
    """
    width = (high - low) / len(counts)
    if not width > 0 or not counts.any():
        return low, high
    zero = int(np.clip(-low / width, 0, len(counts) - 1))
    furthest = max(zero, len(counts) - 1 - zero)
    reaches = np.unique(np.linspace(min(levels // 2, furthest), furthest, _CANDIDATES).astype(int))
    windows = [(max(0, zero - reach), min(len(counts), zero + reach + 1)) for reach in reaches]
    losses = [clipping_divergence(counts, start, stop, levels) for start, stop in windows]
    # The widest of equals: nothing is clipped for nothing.
    start, stop = windows[len(losses) - 1 - int(np.argmin(losses[::-1]))]
    return low + start * width, low + stop * width


def clipping_divergence(counts: NDArray[np.int64], start: int, stop: int, levels: int) -> float:
    """KL(P || Q) in nats, for bins start..stop-1 kept.

    P are the counts with all that is clipped in the end bins. Q is what ``levels`` codes know of the counts
    without it: each code's mass spread over those of its bins that P fills.
    """
    kept = counts[start:stop]
    clipped = kept.astype(np.float64)
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[stop:].sum()
    code = np.arange(stop - start) * min(levels, stop - start) // (stop - start)
    filled = clipped > 0
    mass = np.bincount(code, kept, levels)
    room = np.bincount(code, filled, levels)
    share = np.divide(mass, room, out=np.zeros(levels), where=room > 0)
    coded = share[code] / max(mass.sum(), 1.0)
    p, q = clipped[filled] / clipped.sum(), np.maximum(coded[filled], _UNREACHED)
    return float((p * np.log(p / q)).sum())
