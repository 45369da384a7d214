"""Scales of blocks stored in two bytes instead of four, where those hold every one of them exactly.

    MatMulNBits(x, W, scales, …)  ->  MatMulNBits(x, W, Cast(half scales), …)

The kernels want float32 scales beside float32 activations. onnxruntime folds a Cast of a constant when it
opens the session, so a step does the same work on the same numbers, and the file is smaller by half a bit a
weight in blocks of 32. `gemini.compress.packing.storable` makes the scales such that they fit.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gemini.export.fusions.patterns import CONTRIB, constant, insert, new_initializer

# The input of each operator that holds the scales of its blocks.
SCALES = {"MatMulNBits": 2, "GatherBlockQuantized": 2}


def halve_scales(graph: ir.Graph) -> int:
    """Returns how many tensors of scales are stored as float16 now."""
    halved: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        slot = SCALES.get(node.op_type) if node.domain == CONTRIB else None
        scales = None if slot is None else node.inputs[slot]
        if slot is None or scales is None:
            continue
        if scales not in halved:
            half = _exact_half(constant(scales))
            if half is None:
                continue
            stored = new_initializer(graph, f"{scales.name}/half", half)
            cast = insert(next(iter(graph)), "Cast", [stored], {"to": ir.DataType.FLOAT}, [scales])
            halved[scales] = cast.outputs[0]
        node.replace_input_with(slot, halved[scales])
    return len(halved)


def _exact_half(scales: np.ndarray | None) -> np.ndarray | None:
    """The same numbers as float16; None where that would change one."""
    if scales is None or scales.dtype != np.float32:
        return None
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), scales) else None
