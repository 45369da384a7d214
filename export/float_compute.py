"""The same graph with quantized weights but float32 arithmetic, to be compared with torch exactly.

Kernels that quantize activations add noise that hides real mistakes, so the gate never looks at them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir

from gemini.export.fusions.experts import ROUTER_WEIGHTS
from gemini.export.fusions.patterns import (
    CONTRIB,
    first_input,
    insert,
    only_user,
    produced_by,
    replace,
)

FLOAT32 = 1
_ZERO_POINTS = 11  # the first of the zero points among the inputs of QMoE
_EXPERTS = (
    *("k", "normalize_routing_weights", "activation_type", "activation_alpha", "activation_beta"),
    *("swiglu_fusion", "swiglu_limit"),
)


@contextmanager
def float_compute(model: ir.Model) -> Iterator[None]:
    """While the block runs, products with quantized weights compute in float32; then the graph is as before.

    MatMulNBits(accuracy_level=4)      ->  MatMulNBits(accuracy_level=1)
    DynamicQuantizeMatMul(x, W, s, z)  ->  MatMul(x, DequantizeLinear(W, s, z))
    MatMulIntegerToFloat(QuantizeLinear(x), W, …)  ->  the same
    DequantizeLinear(QLinearConv(QuantizeLinear(x), W, …))  ->  Conv(x, DequantizeLinear(W, s, z))
    QMoE(accuracy_level=4) of 4 bits  ->  QMoE(accuracy_level=1)
    QMoE(x, r, W, s, …) of 8 bits  ->  MoE(x, r, GatherBlockQuantized(W, s), …)
    """
    blockwise = [n for n in model.graph if n.op_type == "MatMulNBits" or _is_4bit_experts(n)]
    levels = [n.attributes["accuracy_level"].as_int() for n in blockwise]
    for node in blockwise:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", FLOAT32)
    originals = [(made[0], made[1]) for n in list(model.graph) if (made := _in_float(n)) is not None]
    try:
        yield
    finally:
        for node, level in zip(blockwise, levels, strict=True):
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
        for output, added in originals:
            replace(added[-1].outputs[0], output)
            model.graph.remove(added, safe=True)


def _in_float(node: ir.Node) -> tuple[ir.Value, list[ir.Node]] | None:
    """The value that a product in integers ends in and the nodes that now make it; None for other nodes."""
    if node.op_type == "DynamicQuantizeMatMul":
        x, weight, scales, zeros, *bias = node.inputs
        return node.outputs[0], _product(node, x, (weight, scales, zeros), bias)
    if node.op_type == "MatMulIntegerToFloat":
        codes, weight, _, scales, _, zeros, *bias = node.inputs
        return node.outputs[0], _product(node, _before_rounding(codes), (weight, scales, zeros), bias)
    if node.op_type == "QLinearConv":
        end = only_user(node.outputs[0])
        assert end is not None and end.op_type == "DequantizeLinear", node
        return end.outputs[0], _convolution(node, end.outputs[0])
    if node.op_type == "QMoE" and not _is_4bit_experts(node):
        return node.outputs[0], _experts(node)
    return None


def _is_4bit_experts(node: ir.Node) -> bool:
    return node.op_type == "QMoE" and node.attributes["expert_weight_bits"].as_int() == 4


def _before_rounding(codes: ir.Value | None) -> ir.Value:
    node = produced_by(codes, "QuantizeLinear")
    assert node is not None, codes
    return first_input(node)


def _product(
    node: ir.Node,
    x: ir.Value | None,
    weight: Sequence[ir.Value | None],
    bias: Sequence[ir.Value | None],
) -> list[ir.Node]:
    output = node.outputs[0]
    dense = insert(node, "DequantizeLinear", weight, {"axis": 1}, [output])
    dense.outputs[0].shape = None
    added = [dense, insert(node, "MatMul", [x, dense.outputs[0]], {}, [output])]
    if bias and bias[0] is not None:
        added.append(insert(node, "Add", [added[-1].outputs[0], bias[0]], {}, [output]))
    replace(output, added[-1].outputs[0])
    return added


def _convolution(node: ir.Node, output: ir.Value) -> list[ir.Node]:
    codes, input_scale, _, weight, scales, zeros, _, _, *bias = node.inputs
    added = [insert(node, "DequantizeLinear", [weight, scales, zeros], {"axis": 0}, [output])]
    inputs = [_before_rounding(codes), added[0].outputs[0]]
    if bias and bias[0] is not None:
        steps = insert(node, "Mul", [input_scale, scales], {}, [output])
        floats = insert(node, "Cast", [bias[0]], {"to": ir.DataType.FLOAT}, [output])
        added += [steps, floats, insert(node, "Mul", [floats.outputs[0], steps.outputs[0]], {}, [output])]
        inputs.append(added[-1].outputs[0])
    for inner in added:
        inner.outputs[0].shape = None
    added.append(insert(node, "Conv", inputs, dict(node.attributes), [output]))
    replace(output, added[-1].outputs[0])
    return added


def _experts(node: ir.Node) -> list[ir.Node]:
    """There is no float kernel for 8 bits, so the weights are unpacked: by a look-up of every expert."""
    inputs = [*node.inputs, *[None] * (ROUTER_WEIGHTS + 1 - len(node.inputs))]
    x, routed, *products = inputs[:8]
    output, own = node.outputs[0], dict(node.attributes)
    assert products[0] is not None and products[0].const_value is not None, node
    count = len(products[0].const_value.numpy())
    every = insert(node, "Constant", [], {"value_ints": list(range(count))}, [output])
    added, dense = [every], []
    unpack = {"bits": 8, "block_size": own["block_size"], "gather_axis": 0, "quantize_axis": 2}
    for weight, scales, bias, zero_points in (
        (*products[:3], inputs[_ZERO_POINTS]),
        (*products[3:], inputs[_ZERO_POINTS + 1]),
    ):
        packed = [weight, every.outputs[0], scales, zero_points]
        added.append(insert(node, "GatherBlockQuantized", packed, unpack, [output], CONTRIB))
        dense += [added[-1].outputs[0], bias]
    options: dict[str, Any] = {key: own[key] for key in _EXPERTS if key in own}
    if inputs[ROUTER_WEIGHTS] is None:
        added.append(insert(node, "MoE", [x, routed, *dense], options, [output], CONTRIB))
    else:  # the operator has no weights beside what it chooses by, so these are made of their logarithms
        options |= {"normalize_routing_weights": 1}
        added.append(insert(node, "Log", [routed], {}, [output]))
        added.append(insert(node, "MoE", [x, added[-1].outputs[0], *dense], options, [output], CONTRIB))
        mean = added[-1].outputs[0]
        added.append(insert(node, "Constant", [], {"value_ints": [-1]}, [output]))
        added.append(insert(node, "ReduceSum", [routed, added[-1].outputs[0]], {"keepdims": 1}, [output]))
        added.append(insert(node, "Mul", [mean, added[-1].outputs[0]], {}, [output]))
    for inner in added[:-1]:
        inner.outputs[0].shape, inner.outputs[0].type = None, None
    replace(output, added[-1].outputs[0])
    return added
