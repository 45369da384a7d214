"""The last touch on a graph: names of axes, names of nodes, nothing that is not needed."""

from __future__ import annotations

import re

import onnx_ir as ir

# First input that carries an axis names it; the symbols of the trace are arbitrary.
AXES = {
    "input_ids": ("batch", "sequence"),
    "pixel_values": ("batch",),
    "logit_positions": ("batch", "positions"),
    "cross_mask": ("batch", "source"),
    "image_features": ("batch", "images"),
    "past.0.key": ("batch", None, "past"),
}


def finish(model: ir.Model) -> None:
    """Rename axes and nodes in place, drop the shapes of inner values, which onnxruntime infers again."""
    graph = model.graph
    symbols: dict[str, str] = {}
    for value in graph.inputs:
        for dim, name in zip(value.shape or (), AXES.get(value.name or "", ()), strict=False):
            if name is not None and isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                symbols.setdefault(dim.value, name)
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape([_renamed(d, symbols, value.name or "") for d in value.shape or ()])
    outer = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    for index, node in enumerate(graph):
        node.name = f"{node.op_type}_{index}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outer:
                value.shape, value.type = None, None
    graph.name, graph.doc_string = "graph", None
    graph.metadata_props.clear()
    model.metadata_props.clear()


def _renamed(dim: int | ir.SymbolicDim, symbols: dict[str, str], name: str) -> int | ir.SymbolicDim:
    if isinstance(dim, int) or dim.value is None:
        return dim
    if name.startswith("present."):
        # The capacity of a shared buffer, or past + sequence of a concatenated one: an axis of its own.
        return ir.SymbolicDim(symbols.get(dim.value, "present"))
    return ir.SymbolicDim(re.sub(r"\w+", lambda m: symbols.get(m.group(), m.group()), dim.value))
