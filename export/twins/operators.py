"""Emit one ONNX operator into a torch.export graph (torch.onnx.ops.symbolic)."""

from collections.abc import Sequence
from typing import Any

import torch

CONTRIB = "com.microsoft"
Shape = Sequence[int | torch.SymInt]


def emit(
    operator: str,
    inputs: Sequence[torch.Tensor | None],
    attributes: dict[str, Any],
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    version: int = 1,
) -> torch.Tensor:
    """One node with one output. ``operator`` is ``domain::Name`` or a standard ``Name``; trailing None
    inputs drop."""
    return torch.onnx.ops.symbolic(
        operator, _trimmed(inputs), attrs=attributes, dtype=dtype, shape=shape, version=version
    )


def emit_many(
    operator: str, inputs: Sequence[torch.Tensor | None], attributes: dict[str, Any], shapes: Sequence[Shape]
) -> Sequence[torch.Tensor]:
    """One node with several float32 outputs."""
    return torch.onnx.ops.symbolic_multi_out(
        operator,
        _trimmed(inputs),
        attrs=attributes,
        dtypes=(torch.float32,) * len(shapes),
        shapes=tuple(shapes),
        version=1,
    )


def _trimmed(inputs: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    kept = list(inputs)
    while kept and kept[-1] is None:
        kept.pop()
    return tuple(kept)
