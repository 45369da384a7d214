"""What a pass did, layer by layer: goes into the manifest and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemini.compress.modules import Bnb4Linear
from gemini.compress.packing import scale_bytes
from gemini.compress.select import Skipped


@dataclass(frozen=True)
class LayerReport:
    """One layer that a pass changed.

    ``bytes`` counts codes, scales and zero points (not the bias). ``relative_error`` is
    ``sum E[x_j^2] (w_ij - w'_ij)^2 / sum E[x_j^2] w_ij^2``, with E[x^2] = 1 where calibration did not see
    the layer. A tied head has no bytes and no parameters of its own: they are the embedding's.
    """

    name: str
    kind: str  # "linear" | "experts" | "embedding" | "head" | "tied head" | "convolution" | "cache"
    bits: int
    block_size: int | None  # None: one scale per output channel
    symmetric: bool
    parameters: int
    bytes: int
    relative_error: float


@dataclass(frozen=True)
class PassReport:
    """One pass: its options, the layers it changed or left alone, and the price of a weight in bits.

    ``folded``: before it, batch norms that became part of their convolutions, and norms and linears that
    scales were divided out of.
    """

    type: str
    options: dict[str, Any]
    layers: list[LayerReport]
    skipped: list[Skipped]
    bits_per_weight: float | None  # None: no weight was changed
    calibration_windows: int
    seconds: float
    folded: Sequence[str] = ()


def layer_report(
    name: str, kind: str, weight: Tensor, module: nn.Module, importance: Tensor | None
) -> LayerReport:
    """Compare a packed module with the float weight (N, K) that it replaces."""
    bits = 4 if isinstance(module, Bnb4Linear) else getattr(module, "bits", 8)
    size = getattr(module, "block_size", None)
    symmetric = getattr(module, "zero_points", None) is None
    buffers = {key: each for key, each in module.named_buffers(recurse=False) if key != "bias"}
    scales = scale_bytes(buffers.pop("scales")) if size is not None and "scales" in buffers else 0
    stored = scales + sum(each.numel() * each.element_size() for each in buffers.values())
    error = relative_error(weight, module.dequantized().flatten(1), importance)
    return LayerReport(name, kind, bits, size, symmetric, weight.numel(), stored, error)


def table_reports(name: str, kind: str, weight: Tensor, module: nn.Module) -> list[LayerReport]:
    """Of a token embedding or a head: one report, or one for each part."""
    parts = list(getattr(module, "parts", ()))
    if not parts:
        return [layer_report(name, kind, weight, module, None)]
    spans = weight.split([len(part.qweight) for part in parts])
    return [
        layer_report(f"{name}.parts.{number}", kind, rows, part, None)
        for number, (rows, part) in enumerate(zip(spans, parts, strict=True))
    ]


def relative_error(weight: Tensor, approximation: Tensor, importance: Tensor | None) -> float:
    """Share of the layer's output energy that the approximation gets wrong, inputs taken as uncorrelated.

    ``weight`` and ``approximation`` (N, K), ``importance`` (K,) = E[x^2] or None for ones. 0 for an all-zero
    weight.
    """
    mass = torch.ones(weight.shape[1]) if importance is None else importance.float()
    energy = torch.mv(weight.square(), mass).sum(dtype=torch.float64)
    wrong = torch.mv((weight - approximation).square(), mass).sum(dtype=torch.float64)
    return float(wrong / energy) if energy > 0 else 0.0


def bits_per_weight(layers: list[LayerReport]) -> float:
    """Stored bits, scales and zero points included, per original weight of the changed layers."""
    parameters = sum(layer.parameters for layer in layers)
    return 8.0 * sum(layer.bytes for layer in layers) / parameters if parameters else 0.0
