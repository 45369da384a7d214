"""Drop data movement that cancels out.

Transpose(p) -> Transpose(q), p∘q = identity        ->  (nothing)
Reshape -> Reshape                                  ->  Reshape
Reshape to the shape that the input has             ->  (nothing)
Slice from 0 to the end, Identity, Cast to its own type, Expand to its own shape -> (nothing)
Reshape by a computed shape, one free dimension     ->  Reshape by a constant (0 copies, -1 infers)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from gemini.export.fusions.patterns import (
    constant,
    dims,
    first_input,
    insert,
    new_initializer,
    produced_by,
    replace,
)

END = np.iinfo(np.int64).max


def drop_transpose_pairs(graph: ir.Graph) -> int:
    """Transposes that undo each other."""
    count = 0
    for node in graph:
        first = produced_by(node.inputs[0], "Transpose") if node.op_type == "Transpose" else None
        if first is None:
            continue
        p, q = (n.attributes["perm"].as_ints() for n in (first, node))
        if [p[i] for i in q] == list(range(len(p))):
            replace(node.outputs[0], first_input(first))
            count += 1
    return count


def drop_no_ops(graph: ir.Graph) -> int:
    """Nodes that hand their input through."""
    count = 0
    for node in graph:
        if node.op_type in _NO_OP and not node.domain and _NO_OP[node.op_type](node):
            source = first_input(node)
            if source.producer() is None and node.outputs[0].is_graph_output():
                continue  # a graph output must be made by a node
            replace(node.outputs[0], source)
            count += 1
    return count


def _same_shape(node: ir.Node) -> bool:
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    return before is not None and before == after and "None" not in before


def _whole_slice(node: ir.Node) -> bool:
    starts, ends = constant(_folded(node.inputs[1])), constant(_folded(node.inputs[2]))
    steps = constant(_folded(node.inputs[4])) if len(node.inputs) > 4 else np.ones(1)
    if starts is None or ends is None or steps is None:
        return False
    return bool((starts == 0).all() and (ends == END).all() and (steps == 1).all())


def _folded(value: ir.Value | None) -> ir.Value | None:
    """Look through the Cast and Reshape chains that the converter wraps around constant indices."""
    while (
        value is not None and (node := value.producer()) is not None and node.op_type in ("Cast", "Reshape")
    ):
        value = node.inputs[0]
    return value


def _own_type(node: ir.Node) -> bool:
    source = first_input(node)
    return source.type is not None and source.type.dtype == ir.DataType(node.attributes["to"].as_int())


_NO_OP: dict[str, Callable[[ir.Node], bool]] = {
    "Identity": lambda node: True,
    "Reshape": _same_shape,
    "Expand": _same_shape,
    "Slice": _whole_slice,
    "Cast": _own_type,
}


def join_reshapes(graph: ir.Graph) -> int:
    """Only the last of consecutive reshapes counts."""
    count = 0
    for node in graph:
        first = produced_by(node.inputs[0], "Reshape") if node.op_type == "Reshape" else None
        # A 0 in a constant shape copies a dimension of its own input, so it may not change its input.
        if first is not None and (shape := constant(node.inputs[1])) is not None and (shape == 0).any():
            continue
        if first is not None:
            node.replace_input_with(0, first.inputs[0])
            count += 1
    return count


def fix_reshapes(graph: ir.Graph) -> int:
    """Shapes computed at run time that the symbols of the trace already tell."""
    count = 0
    for node in graph:
        if node.op_type != "Reshape" or constant(node.inputs[1]) is not None:
            continue
        target = _constant_shape(dims(node.inputs[0]), dims(node.outputs[0]))
        if target is None:
            continue
        name = "shape/" + "_".join(str(d) for d in target)
        shape = graph.initializers.get(name)
        if shape is None:
            shape = new_initializer(graph, name, np.asarray(target, dtype=np.int64))
        fixed = insert(node, "Reshape", [node.inputs[0], shape], {}, node.outputs)
        replace(node.outputs[0], fixed.outputs[0])
        count += 1
    return count


def _constant_shape(before: tuple[str, ...] | None, after: tuple[str, ...] | None) -> list[int] | None:
    if before is None or after is None or "None" in after:
        return None
    target, free = [], 0
    for i, dim in enumerate(after):
        if dim.isdigit():
            target.append(int(dim))
        elif i < len(before) and before[i] == dim:
            target.append(0)
        else:
            target.append(-1)
            free += 1
    return target if free <= 1 else None
