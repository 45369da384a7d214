"""Linear layers: MatMulNBits, DynamicQuantizeMatMul, MatMulIntegerToFloat, MatMulBnb4 for quantized weights,
FusedMatMul for float32.

Every weight stays in its (out_features, in_features) order, so a head tied to an embedding keeps the
embedding's bytes and is stored once.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gemini.compress.modules import Bnb4Linear, ChannelwiseLinear, QuantizedLinear
from gemini.compress.ranges import Codes
from gemini.export.twins.operators import CONTRIB, Packed, emit, quantize_linear

# Level 4 is the only one with fast kernels on CPU: int8 activations, one scale a block.
INT8_ACTIVATIONS = 4


class BlockwiseTwin(Packed):
    """MatMulNBits: 4- or 8-bit blocks, activations quantized to int8 inside the kernel."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        for name in ("qweight", "scales", "zero_points", "bias"):
            self.register_buffer(name, getattr(layer, name))
        self.out_features = layer.out_features
        self.attributes = {
            "K": layer.in_features,
            "N": layer.out_features,
            "bits": layer.bits,
            "block_size": layer.block_size,
            "accuracy_level": INT8_ACTIVATIONS,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = (x, self.qweight, self.scales, self.zero_points, None, self.bias)
        return emit(f"{CONTRIB}::MatMulNBits", inputs, self.attributes, (*x.shape[:-1], self.out_features))


class ChannelwiseTwin(nn.Module):
    """DynamicQuantizeMatMul: one scale a row of the weight, one scale and zero point for the whole
    activation."""

    def __init__(self, layer: ChannelwiseLinear) -> None:
        super().__init__()
        # The operator wants (in_features, out_features).
        self.register_buffer("weight", layer.qweight.t().contiguous())
        self.register_buffer("scales", layer.scales)
        self.register_buffer("zero_points", torch.zeros_like(layer.scales, dtype=torch.int8))
        self.register_buffer("bias", layer.bias)
        self.register_buffer("factor", None if layer.divisor is None else 1 / layer.divisor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.factor is not None:
            x = x * self.factor
        inputs = (x, self.weight, self.scales, self.zero_points, self.bias)
        return emit(f"{CONTRIB}::DynamicQuantizeMatMul", inputs, {}, (*x.shape[:-1], self.weight.shape[1]))


class StaticTwin(ChannelwiseTwin):
    """QuantizeLinear with fixed codes, then MatMulIntegerToFloat: integers inside, float32 outside.

    onnxruntime fuses the portable spelling (DequantizeLinear, MatMul) to the same kernel, but leaves the
    bias to a node of its own; QGemm and QLinearMatMul measured slower (benchmarks/LOG.md).
    """

    def __init__(self, layer: ChannelwiseLinear, codes: Codes) -> None:
        super().__init__(layer)
        self.register_buffer("input_scale", torch.tensor(codes.scale))
        self.register_buffer("input_zero_point", torch.tensor(codes.zero_point, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.factor is not None:
            x = x * self.factor
        rounded = quantize_linear(x, self.input_scale, self.input_zero_point)
        inputs = (rounded, self.weight, self.input_scale, self.scales, self.input_zero_point)
        shape = (*x.shape[:-1], self.weight.shape[1])
        return emit(f"{CONTRIB}::MatMulIntegerToFloat", (*inputs, self.zero_points, self.bias), {}, shape)


class Bnb4Twin(Packed):
    """MatMulBnb4: bitsandbytes' own 4-bit codes, bit for bit."""

    def __init__(self, layer: Bnb4Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", layer.qweight)
        self.register_buffer("absmax", layer.absmax)
        self.register_buffer("bias", layer.bias)
        self.out_features = layer.out_features
        self.attributes = {
            "K": layer.in_features,
            "N": layer.out_features,
            "block_size": layer.block_size,
            "quant_type": layer.quant_type,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], self.out_features)
        product = emit(f"{CONTRIB}::MatMulBnb4", (x, self.qweight, self.absmax), self.attributes, shape)
        return product if self.bias is None else product + self.bias


class FloatTwin(nn.Module):
    """FusedMatMul with the transposition inside the operator: no transposed copy of the weight exists."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.transposed = transposed
        self.out_features = weight.shape[0] if transposed else weight.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attributes = {"transA": 0, "transB": int(self.transposed), "alpha": 1.0}
        product = emit(
            f"{CONTRIB}::FusedMatMul", (x, self.weight), attributes, (*x.shape[:-1], self.out_features)
        )
        return product if self.bias is None else product + self.bias


def as_linear(module: nn.Module) -> nn.Module | None:
    """The twin of a linear layer, quantized or not; None for anything else."""
    if isinstance(module, QuantizedLinear):
        return BlockwiseTwin(module)
    if isinstance(module, ChannelwiseLinear):
        codes = module.input_codes
        return ChannelwiseTwin(module) if codes is None else StaticTwin(module, codes)
    if isinstance(module, Bnb4Linear):
        return Bnb4Twin(module)
    if type(module) is nn.Linear:
        return FloatTwin(module.weight, module.bias, transposed=True)
    if type(module) is Conv1D:
        return FloatTwin(module.weight, module.bias, transposed=False)
    return None
