"""The same graph with quantized weights but float32 arithmetic, to be compared with torch exactly.

Kernels that quantize activations add noise that hides real mistakes, so the gate never looks at them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir

from gemini.export.fusions.patterns import insert, replace

FLOAT32 = 1


@contextmanager
def float_compute(model: ir.Model) -> Iterator[None]:
    """While the block runs, products with quantized weights compute in float32; then the graph is as before.

    MatMulNBits(accuracy_level=4)      ->  MatMulNBits(accuracy_level=1)
    DynamicQuantizeMatMul(x, W, s, z)  ->  MatMul(x, DequantizeLinear(W, s, z))
    """
    blockwise = [n for n in model.graph if n.op_type == "MatMulNBits"]
    levels = [n.attributes["accuracy_level"].as_int() for n in blockwise]
    for node in blockwise:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", FLOAT32)
    dynamic = [n for n in model.graph if n.op_type == "DynamicQuantizeMatMul"]
    originals = [(n, n.outputs[0], _dequantized(n)) for n in dynamic]
    try:
        yield
    finally:
        for node, level in zip(blockwise, levels, strict=True):
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
        for _, output, added in originals:
            replace(added[-1].outputs[0], output)
            model.graph.remove(added, safe=True)


def _dequantized(node: ir.Node) -> list[ir.Node]:
    x, weight, scales, zeros, *bias = node.inputs
    output = node.outputs[0]
    dense = insert(node, "DequantizeLinear", [weight, scales, zeros], {"axis": 1}, [output])
    dense.outputs[0].shape = None
    product = insert(node, "MatMul", [x, dense.outputs[0]], {}, [output])
    added = [dense, product]
    if bias and bias[0] is not None:
        added.append(insert(node, "Add", [product.outputs[0], bias[0]], {}, [output]))
    replace(output, added[-1].outputs[0])
    return added
