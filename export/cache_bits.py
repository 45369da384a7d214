"""An 8-bit cache in a decoder's graph: GroupQueryAttention with fixed scales, past and present int8.

    GroupQueryAttention(…, past float32)  ->  GroupQueryAttention(…, past int8, k_scale, v_scale)

New keys and values are rounded as they are appended, and attention reads what was appended: a prefill sees
the same cache as the steps after it. Source: com.microsoft.GroupQueryAttention, k_quant_type "PER_CHANNEL".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch

from gemini.errors import ExportError
from gemini.export.fusions.patterns import new_initializer

_SCALES = 12  # the position of k_scale among the inputs, v_scale follows
_ATTRIBUTES = (
    ir.AttrString("k_quant_type", "PER_CHANNEL"),
    ir.AttrString("v_quant_type", "PER_CHANNEL"),
    ir.AttrInt64("kv_cache_bit_width", 8),
)


def quantize_past(model: ir.Model, scales: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Make the cache of every layer int8; ``scales`` are float32 (kv_heads, dim) of keys and values.

    ExportError if the graph keeps its cache in another way.
    """
    nodes = {str(node.outputs[1].name): node for node in _attentions(model)}
    for index, pair in enumerate(scales):
        node = nodes.get(f"present.{index}.key")
        if node is None:
            raise ExportError(
                "This model's cache cannot have 8 bits: its attention is no GroupQueryAttention.",
                "Leave the 8-bit cache out.",
            )
        node.resize_inputs(_SCALES + 2)
        for offset, (kind, own) in enumerate(zip(("key", "value"), pair, strict=True)):
            made = new_initializer(model.graph, f"cache.{index}.{kind}_scale", own.flatten().numpy())
            node.replace_input_with(_SCALES + offset, made)
    _set(model, True)


@contextmanager
def float_past(model: ir.Model) -> Iterator[None]:
    """The same graph with a float32 cache while the block runs."""
    quantized = [node for node in _attentions(model) if "kv_cache_bit_width" in node.attributes]
    scales = [(node, node.inputs[_SCALES], node.inputs[_SCALES + 1]) for node in quantized]
    if quantized:
        for node in quantized:
            node.resize_inputs(_SCALES)
        _set(model, False)
    try:
        yield
    finally:
        for node, *own in scales:
            node.resize_inputs(_SCALES + 2)
            for offset, value in enumerate(own):
                node.replace_input_with(_SCALES + offset, value)
        if quantized:
            _set(model, True)


def _attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def _set(model: ir.Model, integers: bool) -> None:
    kind = ir.TensorType(ir.DataType.INT8 if integers else ir.DataType.FLOAT)
    for node in _attentions(model):
        for value in (*node.inputs[3:5], *node.outputs[1:3]):
            assert value is not None, node
            value.type = kind
        for attribute in _ATTRIBUTES:
            if integers:
                node.attributes[attribute.name] = attribute
            else:
                node.attributes.pop(attribute.name, None)
