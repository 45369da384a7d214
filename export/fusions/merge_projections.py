"""Projections of one input as one product.

    x -> MatMulNBits(Wq), MatMulNBits(Wk), MatMulNBits(Wv) -> GroupQueryAttention(q, k, v)
        ->  x -> MatMulNBits([Wq; Wk; Wv]) -> GroupQueryAttention(qkv)
    x -> MatMulNBits(Wgate), MatMulNBits(Wup)
        ->  x -> MatMulNBits([Wgate; Wup]) -> Split

Rows of a block-quantized weight are independent, so stacking them changes no number. Refused when bits, block or
the presence of zero points and biases differ, or when a weight is shared with another node.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gemini.export.fusions.patterns import (
    CONTRIB,
    constant,
    insert,
    new_initializer,
    only_user,
    produced_by,
    replace,
)

MATMUL = "MatMulNBits"


def pack_qkv(graph: ir.Graph) -> int:
    """Returns how many attention nodes now read one packed product."""
    count = 0
    for node in list(graph):
        if node.op_type != "GroupQueryAttention":
            continue
        products = [produced_by(v, MATMUL, CONTRIB) for v in node.inputs[:3]]
        if any(p is None for p in products) or any(only_user(v) is not node for v in node.inputs[:3]):
            continue
        merged = _merge(graph, [p for p in products if p is not None], before=node)
        if merged is None:
            continue
        node.replace_input_with(0, merged.outputs[0])
        node.replace_input_with(1, None)
        node.replace_input_with(2, None)
        graph.remove([p for p in products if p is not None], safe=True)
        count += 1
    return count


def merge_siblings(graph: ir.Graph) -> int:
    """Pairs of products of one input whose results meet in a gate; returns how many pairs became one."""
    count = 0
    for node in list(graph):
        if node.op_type != "Mul" or node.domain:
            continue
        up = produced_by(node.inputs[1], MATMUL, CONTRIB)
        gate = _behind_activation(node.inputs[0])
        if up is None or gate is None or gate is up or only_user(up.outputs[0]) is not node:
            continue
        sizes = [n.attributes["N"].as_int() for n in (gate, up)]
        merged = _merge(graph, [gate, up], before=gate)
        if merged is None:
            continue
        lengths = new_initializer(graph, f"{merged.outputs[0].name}/split", np.asarray(sizes, dtype=np.int64))
        split = insert(
            gate, "Split", [merged.outputs[0], lengths], {"axis": -1}, [gate.outputs[0], up.outputs[0]]
        )
        for old, new in zip((gate, up), split.outputs, strict=True):
            replace(old.outputs[0], new)
        graph.remove([gate, up], safe=True)
        count += 1
    return count


def _behind_activation(value: ir.Value | None) -> ir.Node | None:
    """The product behind ``f(x)`` or ``x * sigmoid(x)``."""
    node = None if value is None else value.producer()
    for _ in range(3):
        if node is None or (node.op_type == MATMUL and node.domain == CONTRIB):
            return node
        if node.op_type not in ("Mul", "Sigmoid", "Gelu", "Relu", "Tanh", "Swish", "QuickGelu"):
            return None
        node = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), None)
    return node if node is not None and node.op_type == MATMUL else None


def _merge(graph: ir.Graph, nodes: Sequence[ir.Node], before: ir.Node) -> ir.Node | None:
    """One MatMulNBits whose rows are those of ``nodes`` in order; None if they differ in kind."""
    if any(n.inputs[0] is not nodes[0].inputs[0] for n in nodes):
        return None
    kinds = {
        tuple(n.attributes[a].as_int() for a in ("K", "bits", "block_size", "accuracy_level")) for n in nodes
    }
    slots = {tuple(v is not None for v in _padded(n)) for n in nodes}
    if len(kinds) != 1 or len(slots) != 1:
        return None
    stacked: list[ir.Value | None] = [nodes[0].inputs[0]]
    for slot, present in enumerate(next(iter(slots))[1:], start=1):
        if not present:
            stacked.append(None)
            continue
        weights = [_padded(n)[slot] for n in nodes]
        parts = [p for w in weights if only_user(w) is not None and (p := constant(w)) is not None]
        if len(parts) != len(nodes):
            return None
        name = "+".join(str(w.name) for w in weights if w is not None)
        stacked.append(new_initializer(graph, name, np.concatenate(parts)))
    while stacked[-1] is None:
        stacked.pop()
    attributes = {a: nodes[0].attributes[a].as_int() for a in ("K", "bits", "block_size", "accuracy_level")}
    attributes["N"] = sum(n.attributes["N"].as_int() for n in nodes)
    merged = insert(before, MATMUL, stacked, attributes, [nodes[0].outputs[0]], CONTRIB)
    shape = nodes[0].outputs[0].shape
    if shape is not None:
        merged.outputs[0].shape = ir.Shape([*shape[:-1], attributes["N"]])
    return merged


def _padded(node: ir.Node) -> list[ir.Value | None]:
    return [*node.inputs, *[None] * (6 - len(node.inputs))]
