"""Products of one value with equal constants become one, as smoothed projections of one input have them.

x -> Mul(c) -> product(Wq), x -> Mul(c) -> product(Wk)     ->  x -> Mul(c) -> product(Wq), product(Wk)
"""

from __future__ import annotations

import onnx_ir as ir

from gemini.export.fusions.patterns import constant, replace


def share_factors(graph: ir.Graph) -> int:
    """Returns how many products were spared."""
    first: dict[tuple[ir.Value, bytes], ir.Value] = {}
    count = 0
    for node in graph:
        if node.op_type != "Mul" or node.domain:
            continue
        value, factor = node.inputs
        array = None if value is None else constant(factor)
        if array is None or value is None or node.outputs[0].is_graph_output():
            continue
        key = (value, bytes(str((array.dtype, array.shape)), "ascii") + array.tobytes())
        if key in first:
            replace(node.outputs[0], first[key])
            count += 1
        else:
            first[key] = node.outputs[0]
    return count
