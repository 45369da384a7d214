"""How codes and scales are stored: two 4-bit codes in a byte, low nibble first, the way MatMulNBits and
GatherBlockQuantized read them; scales as values that two bytes hold."""

from __future__ import annotations

import torch
from torch import Tensor

# A scale from 2^-17 to the largest float16 keeps 8 bits or more of its mantissa as a float16.
SMALLEST_HALF, LARGEST_HALF = 2.0**-17, 65504.0


def pack_4bit(codes: Tensor, pad: int = 0) -> Tensor:
    """Pack codes 0..15 in pairs along the last axis: (..., n) uint8 -> (..., ceil(n / 2)) uint8.

    The even index goes to the low nibble; an odd ``n`` is completed with ``pad``.
    """
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=pad)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_4bit(packed: Tensor, count: int) -> Tensor:
    """Inverse of ``pack_4bit``: (..., ceil(count / 2)) uint8 -> (..., count) uint8 codes 0..15."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return pairs.flatten(-2)[..., :count]


def storable(scale: Tensor) -> Tensor:
    """Scales (float32) rounded to values that a float16 holds exactly, so that they are stored in two bytes.

    Codes are chosen for the rounded scale. Scales too small or too large for a float16 stay as they are.
    """
    size = scale.abs()
    fits = (size >= SMALLEST_HALF) & (size <= LARGEST_HALF)
    return torch.where(fits, scale.half().float(), scale)


def scale_bytes(scale: Tensor) -> int:
    """Bytes that scales take in a bundle: two each where a float16 holds all of them exactly, else four."""
    return scale.numel() * (2 if torch.equal(scale.half().float(), scale) else 4)
