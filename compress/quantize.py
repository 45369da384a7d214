"""Blockwise integer quantization as pure functions on float32 tensors.

A weight (rows, K) is cut into blocks of ``block_size`` along K, zero-padded at the end. A block is stored as
codes ``q`` in 0..2^bits-1, a float scale and an integer zero point, and stands for ``(q - zero_point) *
scale``. With ``symmetric`` the zero point is the middle code, and the scale carries a sign so that the value
of largest magnitude sits on the longer, negative side of the range.

    weight -> quantize(weight, bits=4, block_size=64, importance=moments) -> Quantized
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemini.compress.hqq import hqq_qparams
from gemini.compress.modules import dequantize_blocks
from gemini.compress.packing import pack_4bit, scale_bytes, storable, unpack_4bit

# Candidate ranges as a share of the round-to-nearest range, and candidate moves of the zero point: together
# they shrink both ends independently. Against a dense scan the mean error is 1 % above the optimum when the
# importance varies by a factor e, 4 % when by e^2; twice as many candidates gain less than 1 % more.
SHRINK = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.5)
SHIFT = (0, -1, 1)
REFITS = 2
IMPORTANCE_FLOOR = 1e-6  # relative to the mean importance of the layer
_CHUNK = 1 << 19  # weights handled at once: the working set of the search stays in the processor's cache


@dataclass(frozen=True)
class Quantized:
    """Packed blocks of a weight (rows, K), in the layout of MatMulNBits; see ``modules.QuantizedLinear``."""

    qweight: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    block_size: int
    columns: int

    def dequantized(self) -> Tensor:
        """float32 (rows, K)."""
        return dequantize_blocks(
            self.qweight, self.scales, self.zero_points, self.bits, self.block_size, self.columns
        )

    def split(self, rows: Sequence[int]) -> list[Quantized]:
        """The same in parts of so many rows."""
        zeros = [None] * len(rows) if self.zero_points is None else self.zero_points.split(list(rows))
        parts = zip(self.qweight.split(list(rows)), self.scales.split(list(rows)), zeros, strict=True)
        return [Quantized(*part, self.bits, self.block_size, self.columns) for part in parts]

    def block_params(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points as `fit_qparams` gives them: float32 (B, 1, rows) both."""
        scale = self.scales.T.unsqueeze(1)
        if self.zero_points is None:
            return scale, torch.full_like(scale, 1 << (self.bits - 1))
        blocks = self.scales.shape[1]
        stored = unpack_4bit(self.zero_points, blocks) if self.bits == 4 else self.zero_points
        return scale, stored.T.unsqueeze(1).float()

    def nbytes(self) -> int:
        """Bytes that the codes, the scales and the zero points take."""
        codes = sum(part.numel() for part in (self.qweight, self.zero_points) if part is not None)
        return codes + scale_bytes(self.scales)


def split_blocks(weight: Tensor, block_size: int) -> Tensor:
    """(rows, K) -> (blocks, block_size, rows), the tail of K filled with zeros.

    Rows come last: parameters (blocks, 1, rows) then broadcast, and sums over a block run, along contiguous
    memory, which makes the search three times faster than with the block last.
    """
    rows, columns = weight.shape
    blocks = math.ceil(columns / block_size)
    padded = torch.nn.functional.pad(weight, (0, blocks * block_size - columns))
    return padded.reshape(rows, blocks, block_size).permute(1, 2, 0).contiguous()


def choose_qparams(blocks: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Round-to-nearest scale and zero point (float32 integers), both (B, 1, R), of blocks (B, size, R).

    Asymmetric: the range [min(w, 0), max(w, 0)] over all codes, the zero point rounded and clamped.
    Symmetric: scale is the value of largest magnitude divided by -2^(bits-1), so that value is represented
    whatever its sign, exactly but for the rounding of the scale (`packing.storable`). An all-zero block gets
    scale 1, so nothing divides by zero and the codes are the zero point.
    """
    top, middle = float((1 << bits) - 1), float(1 << (bits - 1))
    if symmetric:
        scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -middle
        zero_point = torch.full_like(scale, middle)
        return storable(torch.where(scale == 0, torch.ones_like(scale), scale)), zero_point
    low, high = blocks.amin(1, keepdim=True).clamp(max=0.0), blocks.amax(1, keepdim=True).clamp(min=0.0)
    scale = high / top - low / top
    scale = storable(torch.where(scale == 0, torch.ones_like(scale), scale))
    return scale, (-low / scale).round().clamp(0.0, top)


def encode(blocks: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes minus zero point, clamped to the range the zero point leaves: (B, size, R) float32 integers."""
    return (blocks / scale).round_().clamp_(-zero_point, float((1 << bits) - 1) - zero_point)


def weighted_error(
    blocks: Tensor, importance: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    """``sum_j importance_j (w_j - (q_j - zero_point) scale)^2`` of each block with its codes: (B, 1, R).

    ``importance`` is (B, size, 1).
    """
    difference = encode(blocks, scale, zero_point, bits).mul_(scale).sub_(blocks)
    return _block_sum(importance, difference.square_())


def fit_qparams(
    blocks: Tensor, importance: Tensor, bits: int, symmetric: bool, fit: str
) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point (B, 1, R) by one of FITS.

    "nearest" takes them from the range, "moments" minimises the error weighted by ``importance`` (B, size, 1)
    with :func:`search_qparams`, "hqq" moves the zero point by `gemini.compress.hqq`. ValueError for a name
    that is none of these, or symmetric "hqq", which has no zero point to move.
    """
    if fit == "moments":
        return search_qparams(blocks, importance, bits, symmetric)
    start = choose_qparams(blocks, bits, symmetric)
    if fit == "nearest":
        return start
    if fit != "hqq" or symmetric:
        raise ValueError(f"no fit {fit!r} with symmetric={symmetric}")
    return hqq_qparams(blocks, *start, bits)


def search_qparams(blocks: Tensor, importance: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point (B, 1, R) that minimise ``weighted_error``, never worse than round to
    nearest.

    A grid over both ends of the range comes first. Given codes t = q - z the best scale has the closed form
    s = sum(m w t) / sum(m t^2) and leaves the error sum(m w^2) - sum(m w t)^2 / sum(m t^2), so each grid
    point is judged with its own best scale and no second pass. Then scale, zero point and codes are refitted
    in turn; every step is judged by the true error of what will be stored, and the best one wins.
    """
    best_scale, best_zero = choose_qparams(blocks, bits, symmetric)
    best = weighted_error(blocks, importance, best_scale, best_zero, bits)
    weighted = blocks * importance
    scale, zero_point = _search_grid(blocks, weighted, importance, best_scale, best_zero, bits, symmetric)
    for step in range(REFITS + 1):
        scale = storable(scale)
        error = weighted_error(blocks, importance, scale, zero_point, bits)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero_point, best_zero)
        if step < REFITS:
            codes = encode(blocks, scale, zero_point, bits)
            scale, zero_point = _refit(codes, weighted, importance, scale, zero_point, bits, symmetric)
    return best_scale, best_zero


def _search_grid(
    blocks: Tensor,
    weighted: Tensor,
    importance: Tensor,
    start_scale: Tensor,
    start_zero: Tensor,
    bits: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """The grid point with the largest explained energy ``sum(m w t)^2 / sum(m t^2)``, with its best scale."""
    top = float((1 << bits) - 1)
    best = torch.full_like(start_scale, -1.0)
    best_scale, best_zero = start_scale, start_zero
    for shrink in SHRINK:
        for shift in (1, -1) if symmetric else SHIFT:
            # Symmetric codes are lopsided (-8..7), so the mirrored range is a candidate of its own.
            scale = start_scale * (shrink * shift if symmetric else shrink)
            zero_point = start_zero if symmetric else (start_zero + shift).clamp(0.0, top)
            codes = encode(blocks, scale, zero_point, bits)
            cross = (codes * weighted).sum(1, keepdim=True)
            energy = _block_sum(importance, codes.square_())
            gain = torch.where(energy > 0, cross * cross / energy, torch.zeros_like(cross))
            better = gain > best
            best = torch.where(better, gain, best)
            fitted = torch.where((energy > 0) & (cross != 0), cross / energy, scale)
            best_scale = torch.where(better, fitted, best_scale)
            best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero


def _refit(
    codes: Tensor,
    weighted: Tensor,
    importance: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """Least squares of ``w ~ scale * (q - z)`` for fixed codes; z is rounded, then scale fitted again."""
    new_zero = zero_point
    cross = (weighted * codes).sum(1, keepdim=True)
    energy = _block_sum(importance, codes.square())
    if not symmetric:
        # The line w ~ slope * t + offset over t = q - z has the zero point z - offset / slope.
        mass, mean_w = importance.sum(1, keepdim=True), weighted.sum(1, keepdim=True)
        mean_t = _block_sum(importance, codes)
        slope = (mass * cross - mean_w * mean_t) / (mass * energy - mean_t * mean_t)
        offset = (mean_w - slope * mean_t) / mass
        moved = (zero_point - offset / slope).round().clamp(0.0, float((1 << bits) - 1))
        new_zero = torch.where(torch.isfinite(moved), moved, zero_point)
        # Moving z by d turns t into t - d (d = new - old), and the sums follow without another pass.
        step = new_zero - zero_point
        cross = cross - step * mean_w
        energy = energy - 2.0 * step * mean_t + step * step * mass
    fitted = cross / energy
    return torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, scale), new_zero


def _block_sum(importance: Tensor, values: Tensor) -> Tensor:
    """``sum_j importance_j values_j`` of each block: (B, size, 1), (B, size, R) -> (B, 1, R)."""
    return torch.matmul(importance.transpose(1, 2), values)


def quantize(
    weight: Tensor,
    *,
    bits: int,
    block_size: int,
    symmetric: bool = False,
    fit: str = "nearest",
    importance: Tensor | None = None,
) -> Quantized:
    """Quantize a float weight (rows, K) in blocks; same input, same bytes.

    ``bits`` 4 or 8; ``fit`` as in :func:`fit_qparams`. ``importance`` (K,) is the mean square of each input
    feature (all ones when None). Raises ValueError for values that are not finite.
    """
    require_finite(weight)
    rows, columns = weight.shape
    mass = torch.ones(columns) if importance is None else importance.to(torch.float32)
    mass = split_blocks(relative_mass(mass).unsqueeze(0), block_size)
    step = max(1, _CHUNK // (mass.shape[0] * block_size))
    parts = [
        _quantize_rows(weight[start : start + step], mass, bits, symmetric, fit)
        for start in range(0, rows, step)
    ]
    qweight, scales, zero_points = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Quantized(qweight, scales, None if symmetric else zero_points, bits, block_size, columns)


def _quantize_rows(
    weight: Tensor, mass: Tensor, bits: int, symmetric: bool, fit: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, scales and packed zero points of some rows; ``mass`` is (blocks, size, 1)."""
    blocks = split_blocks(weight.to(torch.float32), mass.shape[1])
    scale, zero_point = fit_qparams(blocks, mass, bits, symmetric, fit)
    return pack_blocks(encode(blocks, scale, zero_point, bits) + zero_point, scale, zero_point, bits)


def pack_blocks(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (B, size, R), scale and zero point (B, 1, R) as MatMulNBits stores them, rows first."""
    codes, zeros = codes.permute(2, 0, 1).to(torch.uint8), zero_point.squeeze(1).T.to(torch.uint8)
    if bits == 4:
        codes, zeros = pack_4bit(codes), pack_4bit(zeros, pad=8)
    return codes.contiguous(), scale.squeeze(1).T.contiguous(), zeros.contiguous()


def relative_mass(importance: Tensor) -> Tensor:
    """Importance (K,) relative to its mean, as only ratios matter.

    The floor keeps features that calibration never saw from being ignored.
    """
    return importance / importance.mean().clamp(min=torch.finfo(torch.float32).tiny) + IMPORTANCE_FLOOR


def require_finite(weight: Tensor) -> None:
    """Raise ValueError for values that are not finite."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds values that are not finite")


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (rows, K) in -127..127 and float32 scales (rows,) of a symmetric per-channel quantization.

    The range is narrow (no -128): x86 kernels without VNNI add pairs of products in 16 bits, and
    DynamicQuantizeMatMul offers no zero point for the weight.
    """
    require_finite(weight)
    scales = weight.abs().amax(-1) / 127.0
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return (weight / scales.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scales


def quantize_bnb4(weight: Tensor, block_size: int, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    """bitsandbytes NF4 or FP4 codes of a weight (N, K) in the layout of MatMulBnb4.

    Returns uint8 ((N*K + 1) // 2,) over the flattened weight, even element in the high nibble, and float32
    absmax, one per ``block_size`` consecutive elements. ``quant_type`` is "nf4" or "fp4".
    """
    from bitsandbytes.functional import quantize_4bit  # slow to import, and only this recipe needs it

    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=block_size, compress_statistics=False, quant_type=quant_type
    )
    count = (weight.numel() + 1) // 2
    return packed.flatten()[:count].contiguous(), state.absmax.to(torch.float32)
