"""Small questions that every fusion asks of a graph, and the one way in which fusions edit it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

CONTRIB = "com.microsoft"


def only_user(value: ir.Value | None) -> ir.Node | None:
    """The single node that reads a value; None if several do or if the graph returns it."""
    if value is None or value.is_graph_output():
        return None
    readers = {use.node for use in value.uses()}
    return next(iter(readers)) if len(readers) == 1 else None


def first_input(node: ir.Node) -> ir.Value:
    """The value that a node works on; every node that fusions look at has one."""
    value = node.inputs[0]
    assert value is not None, node
    return value


def produced_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node of this type that makes a value; None if something else does."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and (node.domain or "") == domain else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array behind a value that is an initializer or a Constant node; None for anything computed."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = produced_by(value, "Constant")
    if node is None:
        return None
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor().numpy()
        if name in ("value_int", "value_ints", "value_float", "value_floats"):
            return np.asarray(attribute.value)
    return None


def dims(value: ir.Value | None) -> tuple[str, ...] | None:
    """The shape as text, one entry a dimension, so that equal symbols compare equal; None when unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(str(d) for d in value.shape)


def like(new: ir.Value, old: ir.Value) -> None:
    """Give a new value the name-independent facts of the value that it replaces."""
    new.shape, new.type = old.shape, old.type


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let everything read ``new`` instead of ``old``; a graph output keeps its name."""
    if old.is_graph_output():
        name = old.name
        old.name = f"{name}/replaced"
        new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any],
    outputs: Sequence[ir.Value],
    domain: str = "",
) -> ir.Node:
    """A new node in front of another; ``outputs`` are the values that it takes over the facts of."""
    node = ir.node(op_type, inputs=inputs, attributes=attributes, domain=domain, num_outputs=len(outputs))
    for made, old in zip(node.outputs, outputs, strict=True):
        like(made, old)
    graph = before.graph
    assert graph is not None
    graph.insert_before(before, node)
    return node


def new_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new named constant of the graph; a name that exists is a bug of ours."""
    assert name not in graph.initializers, name
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
    )
    value.const_value = ir.Tensor(array, name=name)
    graph.register_initializer(value)
    return value
