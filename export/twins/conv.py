"""Convolutions with 8-bit weights: DequantizeLinear in front of the ordinary operator.

onnxruntime has no convolution over int8 weights and float activations on CPU. The runtime lets it compute the
float weight once at load (see session_options), so the file is small and the kernel is the fast float one.
"""

from __future__ import annotations

import torch
from torch import nn

from gemini.compress.modules import ChannelwiseConv
from gemini.export.twins.operators import emit


class ConvTwin(nn.Module):
    """DequantizeLinear along the output channels, then the convolution."""

    def __init__(self, layer: ChannelwiseConv) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("zero_points", torch.zeros_like(layer.scales, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = (self.layer.qweight, self.layer.scales, self.zero_points)
        weight = emit("DequantizeLinear", inputs, {"axis": 0}, self.layer.qweight.shape, version=19)
        return self.layer.convolve(x, weight)


def as_conv(module: nn.Module) -> ConvTwin | None:
    """The twin of a quantized convolution; None for anything else."""
    return ConvTwin(module) if isinstance(module, ChannelwiseConv) else None
