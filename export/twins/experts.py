"""Experts: QMoE over quantized weights, MoE over float32 ones.

Both operators pick the experts of a token themselves, from a number for each, and so does the model's own
router before them. What it chose is handed on: its weights where it chose, zeros elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from gemini.compress.experts import Experts, Gate, PackedStack, as_experts, is_stack
from gemini.compress.modules import QuantizedLinear
from gemini.compress.packing import pack_4bit, unpack_4bit
from gemini.compress.select import SMALLEST_BLOCK
from gemini.export.trace_state import FormMismatch
from gemini.export.twins.linear import INT8_ACTIVATIONS
from gemini.export.twins.operators import CONTRIB, Packed, emit

_INTERLEAVED = 1
_AS_THEY_ARE = 0  # else a GPU's kernel takes them to be in its own order


class QuantizedExpertsTwin(Packed):
    """QMoE: weights of 4 or 8 bits, the same for both products, as the size of their blocks."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.products = ("gate_up", "down")
        layers = [getattr(experts, name).layer for name in self.products]
        assert layers[0].bits == layers[1].bits, "there is no kernel for two widths"
        size = math.gcd(*(n for layer in layers for n in (layer.block_size, layer.in_features)))
        if size < SMALLEST_BLOCK:
            shapes = " and ".join(str(layer.in_features) for layer in layers)
            raise FormMismatch(f"experts with inputs of {shapes} have no common block")
        for name, layer in zip(self.products, layers, strict=True):
            stack = experts.count, layer.out_features // experts.count
            for key, value in _in_blocks(layer, size).items():
                self.register_buffer(f"{name}_{key}", None if value is None else value.unflatten(0, stack))
        self.attributes = {
            **_common(experts.gate),
            "block_size": size,
            "accuracy_level": INT8_ACTIVATIONS,
            "expert_weight_bits": layers[0].bits,
            "weights_prepacked": _AS_THEY_ARE,
        }

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        routed = _everywhere(chosen, weights, len(self.gate_up_qweight))
        inputs = [hidden, routed]
        for name in self.products:
            inputs += [getattr(self, f"{name}_{key}") for key in ("qweight", "scales", "bias")]
        inputs += [None, None, None]  # a third product, which is in the first
        inputs += [getattr(self, f"{name}_zero_points") for name in self.products]
        inputs += [None, routed]
        attributes = {**self.attributes, "k": chosen.shape[-1]}
        return emit(f"{CONTRIB}::QMoE", inputs, attributes, hidden.shape)


class FloatExpertsTwin(nn.Module):
    """MoE, which weighs experts by a softmax of its own: of the logarithms of the router's weights it makes
    these again, but for their sum."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        for name in ("gate_up", "down"):
            layer = getattr(experts, name)
            stack = experts.count, layer.out_features // experts.count
            bias = None if layer.bias is None else layer.bias.detach().unflatten(0, stack)
            self.register_buffer(f"{name}_weight", layer.weight.detach().unflatten(0, stack))
            self.register_buffer(f"{name}_bias", bias)
        self.attributes = {**_common(experts.gate), "normalize_routing_weights": 1}

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        routed = _everywhere(chosen, weights, len(self.gate_up_weight))
        inputs = (
            hidden,
            routed.log(),
            self.gate_up_weight,
            self.gate_up_bias,
            self.down_weight,
            self.down_bias,
        )
        attributes = {**self.attributes, "k": chosen.shape[-1]}
        mean = emit(f"{CONTRIB}::MoE", inputs, attributes, hidden.shape)
        return mean * weights.sum(-1, keepdim=True)


def as_experts_twin(module: nn.Module) -> nn.Module | None:
    """The twin of a stack of experts; None for anything else, FormMismatch for experts without operator."""
    experts = as_experts(module)
    if experts is None:
        if is_stack(module):
            raise FormMismatch(f"no operator computes what {type(module).__name__} does")
        return None
    packed = [isinstance(product, PackedStack) for product in (experts.gate_up, experts.down)]
    if not any(packed):
        return FloatExpertsTwin(experts)
    assert all(packed), "one product of two is quantized"
    return QuantizedExpertsTwin(experts)


def _common(gate: Gate) -> dict[str, Any]:
    limit = {} if math.isinf(gate.limit) else {"swiglu_limit": gate.limit}
    return {
        "activation_type": "swiglu",
        "swiglu_fusion": _INTERLEAVED,
        "activation_alpha": gate.alpha,
        "activation_beta": gate.beta,
        **limit,
    }


def _everywhere(chosen: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """The weights (T, k) of the experts chosen, as those of all (T, E)."""
    none = torch.zeros(chosen.shape[0], experts, dtype=torch.float32)
    return none.scatter(1, chosen, weights.to(torch.float32))


def _in_blocks(layer: QuantizedLinear, size: int) -> dict[str, torch.Tensor | None]:
    """A packed layer's tensors with blocks cut into smaller ones of ``size``, which stand for the same."""
    rows, width = len(layer.qweight), layer.in_features
    times, blocks = layer.block_size // size, width // size
    zero_points = layer.zero_points
    if zero_points is not None:
        if layer.bits == 4:
            zero_points = unpack_4bit(zero_points, layer.scales.shape[1])
        zero_points = zero_points.repeat_interleave(times, 1)[:, :blocks]
        zero_points = pack_4bit(zero_points) if layer.bits == 4 else zero_points
    return {
        "qweight": layer.qweight.reshape(rows, -1)[:, : width * layer.bits // 8].contiguous(),
        "scales": layer.scales.repeat_interleave(times, 1)[:, :blocks].contiguous(),
        "zero_points": zero_points,
        "bias": layer.bias,
    }
