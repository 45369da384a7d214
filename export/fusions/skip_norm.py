"""Residual additions inside the root-mean-square norm that follows.

    Add(a, b) -> RMSNormalization  ->  SkipSimplifiedLayerNormalization(a, b)

The sum stays available as the fourth output, because the residual stream goes on. Refused when the addends
differ in shape (a broadcast bias is no residual) or when an addend is a constant. The fused form of a centred
norm is left out: on CPU it takes twice the time of its two parts (measured, see benchmarks/LOG.md).
"""

from __future__ import annotations

import onnx_ir as ir

from gemini.export.fusions.patterns import CONTRIB, constant, dims, insert, produced_by, replace


def fuse_skip_norm(graph: ir.Graph) -> int:
    """Returns how many norms took their addition in."""
    count = 0
    for node in graph:
        if node.op_type != "RMSNormalization" or node.domain or not _over_last_axis(node):
            continue
        add = produced_by(node.inputs[0], "Add")
        if add is None or not _is_residual(add) or node.outputs[1:]:
            continue
        total, normed = add.outputs[0], node.outputs[0]
        epsilon = node.attributes["epsilon"].as_float()
        skip = insert(
            add,
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, *node.inputs[1:]],
            {"epsilon": epsilon},
            [normed, normed, normed, total],
            CONTRIB,
        )
        replace(normed, skip.outputs[0])
        replace(total, skip.outputs[3])
        for unused in skip.outputs[1:3]:
            unused.name = ""
        graph.remove([node, add], safe=True)
        count += 1
    return count


def _over_last_axis(node: ir.Node) -> bool:
    axis = node.attributes.get("axis")
    shape = dims(node.inputs[0])
    return shape is not None and len(shape) == 3 and (axis is None or axis.as_int() in (-1, 2))


def _is_residual(add: ir.Node) -> bool:
    left, right = (dims(v) for v in add.inputs)
    return left is not None and left == right and all(constant(v) is None for v in add.inputs)
