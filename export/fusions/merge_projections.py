"""Projections of one input as one product.

    x -> product(Wq), product(Wk), product(Wv) -> GroupQueryAttention(q, k, v)
        ->  x -> product([Wq; Wk; Wv]) -> GroupQueryAttention(qkv)
    the same in front of Attention
        ->  x -> product([Wq; Wk; Wv]) -> Split -> Attention(q, k, v)

A product is MatMulNBits, DynamicQuantizeMatMul or MatMulIntegerToFloat. Output features of a quantized
weight are independent, so stacking them changes no number. Refused when the products differ in operator,
bits, block, codes of the input or the presence of zero points and biases, or when a weight is shared with
another node. Gate and up are left apart: the split behind them costs more than the larger product saves
(measured, see benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gemini.export.fusions.patterns import CONTRIB, constant, insert, new_initializer, only_user, replace

# The axis of the output features in every constant input of the operator.
FEATURE_AXIS = {"MatMulNBits": 0, "DynamicQuantizeMatMul": -1, "MatMulIntegerToFloat": -1}


def pack_qkv(graph: ir.Graph) -> int:
    """Returns how many attention nodes now read one packed product."""
    count = 0
    for node in list(graph):
        products = _projections(node, "GroupQueryAttention")
        merged = _merge(graph, products, before=node) if products else None
        if merged is None:
            continue
        node.replace_input_with(0, merged)
        node.replace_input_with(1, None)
        node.replace_input_with(2, None)
        graph.remove(products, safe=True)
        count += 1
    return count


def merge_qkv(graph: ir.Graph) -> int:
    """Attention without a cache takes no packed input on CPU: one product, then a split."""
    count = 0
    for node in list(graph):
        products = _projections(node, "Attention")
        count += bool(products) and _merge_and_split(graph, products, before=node)
    return count


def _projections(node: ir.Node, attention: str) -> list[ir.Node]:
    """The products that feed query, key and value of this attention node and nothing else; or none."""
    if node.op_type != attention or len(node.inputs) < 3:
        return []
    products = [p for v in node.inputs[:3] if only_user(v) is node and (p := _product(v)) is not None]
    return products if len(products) == 3 else []


def _product(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in FEATURE_AXIS and node.domain == CONTRIB else None


def _merge_and_split(graph: ir.Graph, products: list[ir.Node], before: ir.Node) -> bool:
    merged = _merge(graph, products, before)
    if merged is None:
        return False
    sizes = np.asarray([_features(p) for p in products], dtype=np.int64)
    lengths = new_initializer(graph, f"{_weight(products[0]).name}/split", sizes)
    split = insert(before, "Split", [merged, lengths], {"axis": -1}, [p.outputs[0] for p in products])
    for old, new in zip(products, split.outputs, strict=True):
        replace(old.outputs[0], new)
    graph.remove(products, safe=True)
    return True


def _merge(graph: ir.Graph, products: Sequence[ir.Node], before: ir.Node) -> ir.Value | None:
    """One product with the output features of all, in order; None if they differ in kind."""
    first = products[0]
    if any(p.inputs[0] is not first.inputs[0] or _kind(p) != _kind(first) for p in products):
        return None
    stacked: list[ir.Value | None] = [first.inputs[0]]
    for slot in range(1, len(first.inputs)):
        weights = [p.inputs[slot] for p in products]
        if weights[0] is None:
            stacked.append(None)
            continue
        parts = [p for w in weights if (p := constant(w)) is not None]
        if len(parts) != len(products):
            return None
        if parts[0].ndim == 0:  # the codes of the input
            if any(part != parts[0] for part in parts):
                return None
            stacked.append(weights[0])
            continue
        if any(only_user(w) is None for w in weights):
            return None
        name = "+".join(str(w.name) for w in weights if w is not None)
        stacked.append(new_initializer(graph, name, np.concatenate(parts, FEATURE_AXIS[first.op_type])))
    attributes = dict(_attributes(first))
    if "N" in attributes:
        attributes["N"] = sum(_features(p) for p in products)
    merged = insert(before, first.op_type, stacked, attributes, [first.outputs[0]], CONTRIB).outputs[0]
    if merged.shape is not None:
        merged.shape = ir.Shape([*merged.shape[:-1], sum(_features(p) for p in products)])
    return merged


def _kind(product: ir.Node) -> tuple[object, ...]:
    same = sorted((name, value) for name, value in _attributes(product).items() if name != "N")
    return product.op_type, *same, *(value is None for value in product.inputs)


def _attributes(product: ir.Node) -> dict[str, int]:
    return {name: attribute.as_int() for name, attribute in product.attributes.items()}


def _weight(product: ir.Node) -> ir.Value:
    weight = product.inputs[1]
    assert weight is not None
    return weight


def _features(product: ir.Node) -> int:
    weight = constant(_weight(product))
    assert weight is not None
    return int(weight.shape[FEATURE_AXIS[product.op_type]])
