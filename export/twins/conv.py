"""Convolutions with 8-bit weights: in integers where the codes of both ends are known, else in float.

onnxruntime has no convolution over int8 weights and float activations on CPU: DequantizeLinear stands in
front of the ordinary operator, and the runtime lets it compute the float weight once at load (see
session_options), so the file is small and the kernel is the fast float one.
"""

from __future__ import annotations

import torch
from torch import nn

from gemini.compress.modules import ChannelwiseConv
from gemini.compress.ranges import Codes
from gemini.export.twins.operators import Packed, emit, quantize_linear


class ConvTwin(Packed):
    """DequantizeLinear along the output channels, then the convolution."""

    def __init__(self, layer: ChannelwiseConv) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("zero_points", torch.zeros_like(layer.scales, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = (self.layer.qweight, self.layer.scales, self.zero_points)
        weight = emit("DequantizeLinear", inputs, {"axis": 0}, self.layer.qweight.shape, version=19)
        return self.layer.convolve(x, weight)


class StaticConvTwin(Packed):
    """QuantizeLinear, QLinearConv, DequantizeLinear, with fixed codes of input and output."""

    def __init__(self, layer: ChannelwiseConv, codes: tuple[Codes, Codes]) -> None:
        super().__init__()
        for name, end in zip(("input", "output"), codes, strict=True):
            self.register_buffer(f"{name}_scale", torch.tensor(end.scale))
            self.register_buffer(f"{name}_zero_point", torch.tensor(end.zero_point, dtype=torch.uint8))
        self.register_buffer("qweight", layer.qweight)
        self.register_buffer("scales", layer.scales)
        self.register_buffer("zero_points", torch.zeros_like(layer.scales, dtype=torch.int8))
        steps = layer.scales.double() * codes[0].scale
        bias = None if layer.bias is None else (layer.bias / steps).round().to(torch.int32)
        self.register_buffer("bias", bias)
        padding = tuple(int(p) for p in layer.padding)
        self.attributes = {
            "kernel_shape": list(layer.qweight.shape[2:]),
            "strides": list(layer.stride),
            "pads": [*padding, *padding],
            "dilations": list(layer.dilation),
            "group": layer.groups,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = quantize_linear(x, self.input_scale, self.input_zero_point)
        inputs = (
            *(rounded, self.input_scale, self.input_zero_point),
            *(self.qweight, self.scales, self.zero_points),
            *(self.output_scale, self.output_zero_point, self.bias),
        )
        shape = (x.shape[0], self.qweight.shape[0], *map(self._length, range(2), x.shape[2:]))
        codes = emit("QLinearConv", inputs, self.attributes, shape, dtype=torch.uint8, version=10)
        ends = (codes, self.output_scale, self.output_zero_point)
        return emit("DequantizeLinear", ends, {}, shape, version=19)

    def _length(self, axis: int, length: int | torch.SymInt) -> int | torch.SymInt:
        """Of the output along an axis of the picture."""
        kernel, stride, dilation, padding = (
            self.attributes[key][axis] for key in ("kernel_shape", "strides", "dilations", "pads")
        )
        return (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def as_conv(module: nn.Module) -> ConvTwin | StaticConvTwin | None:
    """The twin of a quantized convolution; None for anything else."""
    if not isinstance(module, ChannelwiseConv):
        return None
    return ConvTwin(module) if module.codes is None else StaticConvTwin(module, module.codes)
