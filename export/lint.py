"""Nodes that onnxruntime computes right and slowly: a graph with one is refused before it is written.

Sources: measurements in benchmarks/LOG.md, and onnxruntime's MatMulNBits (matmul_nbits.cc, qnbitgemm.cpp),
which packs weights once for some combinations and unpacks them in every call for all others.
"""

from __future__ import annotations

import onnx_ir as ir

from gemini.compress.specs import BLOCK_SIZES
from gemini.errors import ExportError
from gemini.export.fusions.patterns import produced_by
from gemini.export.twins.linear import INT8_ACTIVATIONS

_WEIGHT, _SCALES, _ZERO_POINTS, _GROUPS = 1, 2, 3, 4  # inputs of MatMulNBits


def refuse_slow(model: ir.Model) -> None:
    """ExportError if a node is known to be slow, with what it is and why; the graph stays as it was.

    MatMulBnb4 is left alone: slow too, and what the recipe nf4 is asked for.
    """
    for node in model.graph:
        if reason := slow_because(node):
            raise ExportError(
                f"{node.op_type} {node.name or node.outputs[0].name!r} would be slow: {reason}.",
                "Report the architecture and the recipe: the exporter should not have made it.",
            )


def slow_because(node: ir.Node) -> str | None:
    """Why onnxruntime's kernel for this node is slow on a CPU, or None."""
    if node.op_type == "SkipLayerNormalization":
        return "Add and LayerNormalization take half the time"
    if node.op_type == "QMoE":
        level = node.attributes.get("accuracy_level")
        fast = level is not None and level.as_int() == INT8_ACTIVATIONS
        return None if fast else "without accuracy_level 4 one token takes four times as long"
    if node.op_type != "MatMulNBits":
        return None
    options = {key: node.attributes[key].as_int() for key in node.attributes}
    if options.get("bits", 4) not in (4, 8):
        return f"there are fast kernels for 4 and 8 bits, not for {options['bits']}"
    if options["block_size"] not in BLOCK_SIZES:
        return f"there is no fast kernel for blocks of {options['block_size']}"
    if options.get("accuracy_level", 0) != INT8_ACTIVATIONS:
        return "without accuracy_level 4 weights are made float in every call"
    zero_points = _input(node, _ZERO_POINTS)
    if zero_points is not None and _dtype(zero_points) != ir.DataType.UINT8:
        return "zero points that are not uint8 keep its weights from being packed"
    if _input(node, _GROUPS) is not None:
        return "g_idx keeps its weights from being packed"
    weights = (_input(node, _WEIGHT), _input(node, _SCALES), zero_points)
    if not all(value is None or _is_constant(value) for value in weights):
        return "weights that are computed are packed in every call"
    return None


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _dtype(value: ir.Value) -> ir.DataType | None:
    return value.dtype if value.const_value is None else value.const_value.dtype


def _is_constant(value: ir.Value) -> bool:
    """Whether onnxruntime knows the value when it opens the graph: a constant, or one in another type."""
    cast = produced_by(value, "Cast")
    return (value if cast is None else cast.inputs[0]).const_value is not None  # type: ignore[union-attr]
