"""In which numbers a step of training multiplies."""

from __future__ import annotations

import contextlib
import platform
from typing import Any

import torch


def bf16_where_native() -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast where the CPU multiplies in bf16 (AVX512-BF16, AMX); emulated, it is slower than fp32."""
    native = platform.machine() in ("x86_64", "AMD64") and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return torch.autocast("cpu", torch.bfloat16) if native else contextlib.nullcontext()
