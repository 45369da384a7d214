"""Two 4-bit codes in a byte, the way MatMulNBits and GatherBlockQuantized read them: low nibble first."""

from __future__ import annotations

import torch
from torch import Tensor


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
