"""Products and codes of one value with equal constants become one, as projections of one input have them.

x -> Mul(c) -> product(Wq), x -> Mul(c) -> product(Wk)     ->  x -> Mul(c) -> product(Wq), product(Wk)
the same with QuantizeLinear(scale, zero point)
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from gemini.export.fusions.patterns import constant, replace

SHARED = ("Mul", "QuantizeLinear")


def share_factors(graph: ir.Graph) -> int:
    """Returns how many nodes were spared."""
    first: dict[Hashable, ir.Value] = {}
    count = 0
    for node in graph:
        if node.op_type not in SHARED or node.domain or node.outputs[0].is_graph_output():
            continue
        arrays = [constant(value) for value in node.inputs[1:]]
        if any(array is None for array in arrays):
            continue
        constants = tuple((str(a.dtype), a.shape, a.tobytes()) for a in arrays if a is not None)
        key = (node.op_type, node.inputs[0], constants)
        if key in first:
            replace(node.outputs[0], first[key])
            count += 1
        else:
            first[key] = node.outputs[0]
    return count
