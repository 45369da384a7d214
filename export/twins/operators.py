"""Emit one ONNX operator into a torch.export graph (torch.onnx.ops.symbolic)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

CONTRIB = "com.microsoft"
Shape = Sequence[int | torch.SymInt]


class Packed(nn.Module):
    """A twin whose weight is not float: ``weight`` is empty, for model code that asks for its dtype."""

    @property
    def weight(self) -> torch.Tensor:
        return torch.empty(0)


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


def quantize_linear(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """uint8 codes of ``x`` with one scale and one zero point."""
    return emit("QuantizeLinear", (x, scale, zero_point), {}, x.shape, dtype=torch.uint8, version=19)


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
