"""The same graph in float16, over the same weights: what a GPU computes with.

onnxruntime's GroupQueryAttention has no float32 kernel for CUDA, and a GPU multiplies float16 several times
as fast. The copy stores no weight again: it reads those of the float32 graph through a Cast, which
onnxruntime folds when it opens the session, and the scales of blocks, stored as float16, as they are.

What follows from token numbers, positions and constants alone (rotary angles, masks) stays float32 up to
where it meets an activation: float16 has no odd number above 2048. Keys and values of past tokens, and those
over an encoder's vectors, are float16 in and out; pixels, logits and embeddings stay float32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from gemini.errors import ExportError
from gemini.export.fusions.patterns import insert, new_initializer, produced_by
from gemini.export.graph_file import INLINE_BYTES

# Operators that onnxruntime has for CUDA in float16 and not in float32.
HALF_ONLY = ("GroupQueryAttention", "QMoE")

# An activation begins where a table is read or weights are unpacked, whatever the table is read by.
_SOURCES = ("Gather", "GatherElements", "GatherND", "GatherBlockQuantized", "DequantizeLinear")
# Inputs that are float32 whatever the operator computes in.
_FLOAT32_INPUTS = {"GroupQueryAttention": (12, 13), "Resize": (1, 2)}
# What takes any type and makes another one.
_TYPELESS = ("Cast", "Shape", "Size")
# Inputs and outputs that stay on the device between two calls.
_CARRIED = ("past.", "present.", "cross.")
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_DOWN, _EXPERT_TILE = 5, 64  # QMoE: the second product's weights among its inputs; moe_quantization.cc
_LARGEST = float(np.finfo(np.float16).max)

_BOOLEAN = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "Not", "And", "Or", "Xor", "IsNaN")
_INTEGER = ("Shape", "Size", "ArgMax", "ArgMin", "NonZero", "QuantizeLinear")
# The input that an operator's output has its type from, where that is not the first one.
_TYPED_BY = {"Where": 1, "GatherBlockQuantized": 2, "DequantizeLinear": 1, "OneHot": 2}


def half_precision(model: ir.Model, folder: Path, only: tuple[str, ...] = ()) -> ir.Model:
    """A copy of a finished graph that computes in float16; ``model`` stays as it is.

    ``folder`` holds the weights. ``only``: operators that compute in float16, all others in float32.
    ExportError for what has no copy: a graph within a node, a weight that float16 cannot hold.
    """
    copy = ir.from_proto(ir.to_proto(model))
    _refuse_what_cuda_has_not(copy.graph)
    types = _types(copy.graph)
    narrow = {node for node in _active(copy.graph, types) if not only or node.op_type in only}
    borders = _Borders(copy.graph, folder)
    for given in copy.graph.inputs:
        if types[given] == _FLOAT and _is_carried(given):
            borders.retype(given)
    for node in list(copy.graph):
        if node.op_type in _TYPELESS:
            continue
        kept = _FLOAT32_INPUTS.get(node.op_type, ())
        for slot, value in enumerate(node.inputs):
            if value is not None and types[value] == _FLOAT:
                wanted = _HALF if node in narrow and slot not in kept else _FLOAT
                node.replace_input_with(slot, borders.in_type(value, wanted, node))
        if node in narrow:
            for made in node.outputs:
                if types[made] == _FLOAT:
                    borders.retype(made)
    for index, output in enumerate(list(copy.graph.outputs)):
        if types[output] == _FLOAT:
            copy.graph.outputs[index] = borders.output(output, _HALF if _is_carried(output) else _FLOAT)
    common.TopologicalSortPass()(copy)
    common.RemoveUnusedNodesPass()(copy)
    return copy


class _Borders:
    """Values by the type that they have now, and the Casts between the two."""

    def __init__(self, graph: ir.Graph, folder: Path) -> None:
        self._graph, self._folder = graph, folder
        self._half: set[ir.Value] = set()
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def retype(self, value: ir.Value) -> None:
        """From now on the value is float16."""
        self._half.add(value)
        if value.type is not None:
            value.type = ir.TensorType(_HALF)

    def in_type(self, value: ir.Value, wanted: ir.DataType, reader: ir.Node) -> ir.Value:
        """The value in the type wanted, for this node and all behind it."""
        if (value in self._half) == (wanted == _HALF):
            return value
        if (value, wanted) not in self._casts:
            self._casts[value, wanted] = self._converted(value, wanted, reader)
        return self._casts[value, wanted]

    def output(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """The value as an output of the graph, under its name."""
        if (value in self._half) == (wanted == _HALF):
            return value
        made = ir.node("Cast", inputs=[value], attributes={"to": wanted})
        self._graph.append(made)
        new = made.outputs[0]
        new.name, value.name = value.name, f"{value.name}/inner"
        new.shape, new.type = value.shape, ir.TensorType(wanted)
        value.shape, value.type = None, None
        return new

    def _converted(self, value: ir.Value, wanted: ir.DataType, reader: ir.Node) -> ir.Value:
        if value.const_value is not None:
            small = self._checked(value)
            if small is not None:
                return new_initializer(self._graph, f"{value.name}/half", small)
        elif (cast := produced_by(value, "Cast")) is not None and cast.inputs[0] is not None:
            value = cast.inputs[0]  # of an integer, or of scales that are stored as float16
            if value.const_value is not None and value.const_value.dtype == wanted:
                return value
        made = insert(reader, "Cast", [value], {"to": wanted}, [value]).outputs[0]
        made.shape, made.type = None, None
        return made

    def _checked(self, value: ir.Value) -> np.ndarray | None:
        """A small constant as float16, the lowest float32 as the lowest float16; None for a stored weight."""
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = self._folder
        assert tensor is not None
        array = tensor.numpy()
        if array.nbytes < INLINE_BYTES:
            infinite = np.isinf(array)
            return np.where(infinite, array, np.clip(array, -_LARGEST, _LARGEST)).astype(np.float16)
        if array.size and max(array.max(), -array.min()) > _LARGEST:
            raise ExportError(
                f"The weight {value.name} has values that float16 cannot hold.", "Leave --gpu out."
            )
        return None


def _refuse_what_cuda_has_not(graph: ir.Graph) -> None:
    """ExportError for a node that CUDA has no kernel for, or one with another demand than the CPU's."""
    for node in graph:
        if any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
            raise ExportError(
                f"{node.op_type} holds a graph of its own, which has no form in half precision.",
                "Leave --gpu out.",
            )
        if node.op_type != "QMoE":
            continue
        packed, bits = node.inputs[_DOWN], node.attributes["expert_weight_bits"].as_int()
        assert packed is not None and packed.const_value is not None, node
        width = packed.const_value.shape.numpy()[2] * 8 // bits
        if width % _EXPERT_TILE:
            raise ExportError(
                f"CUDA's QMoE takes experts whose inner size is a multiple of {_EXPERT_TILE}; it is {width}.",
                "Leave --gpu out, or use --recipe int8.",
            )


def _is_carried(value: ir.Value) -> bool:
    return (value.name or "").startswith(_CARRIED)


def _types(graph: ir.Graph) -> dict[ir.Value, ir.DataType | None]:
    """The type of every value; None where it does not matter, being neither float32 nor float16."""
    types: dict[ir.Value, ir.DataType | None] = {value: value.dtype for value in graph.inputs}
    for value in graph.initializers.values():
        types[value] = None if value.const_value is None else value.const_value.dtype
    for node in graph:
        for index, value in enumerate(node.outputs):
            types[value] = value.dtype or _output_type(node, index, types)
    return types


def _output_type(node: ir.Node, index: int, types: dict[ir.Value, ir.DataType | None]) -> ir.DataType | None:
    if node.op_type in ("Cast", "ConstantOfShape"):
        return _stated_type(node)
    if node.op_type in (*_BOOLEAN, *_INTEGER) or (node.op_type == "TopK" and index == 1):
        return None
    if node.op_type == "DynamicQuantizeLinear":
        return _FLOAT if index == 1 else None
    source = node.inputs[_TYPED_BY.get(node.op_type, 0)] if node.inputs else None
    return None if source is None else types[source]


def _stated_type(node: ir.Node) -> ir.DataType:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    value = node.attributes.get("value")
    return _FLOAT if value is None else value.as_tensor().dtype


def _active(graph: ir.Graph, types: dict[ir.Value, ir.DataType | None]) -> set[ir.Node]:
    """The nodes that work on activations: on what comes from the graph's inputs and its tables."""
    active = {value for value in graph.inputs if types[value] == _FLOAT}
    found = set()
    for node in graph:
        floats = [value for value in node.inputs if value is not None and types[value] == _FLOAT]
        if any(value in active for value in floats) or (floats and node.op_type in _SOURCES):
            found.add(node)
            active.update(value for value in node.outputs if types[value] == _FLOAT)
    return found
