"""Tables of cosines and sines that a few constants and four nodes say as well.

    cos_cache, sin_cache (P, D/2)  ->  angle = Range(P) x frequencies;  s Cos(angle), s Sin(angle)

onnxruntime folds such nodes when it loads a graph, so nothing is computed twice; a file is smaller by what
the tables take (2.1 MB of 96 for SmolLM2-135M). Refused when the constants found do not give the tables back
to within rounding, as with frequencies that change with the position.

Source: Su et al. 2021, "RoFormer", equation 34; the factor s is that of YaRN (Peng et al., 2023, section
3.4).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gemini.export.fusions.patterns import CONTRIB, constant, insert, new_initializer, replace

_COS, _SIN = 7, 8  # inputs of GroupQueryAttention
TOLERANCE = 2e-6  # of cosines, which are at most a few
LEAST = 1024  # numbers; smaller tables are not worth nodes


def compute_rotary_tables(graph: ir.Graph) -> int:
    """Returns how many pairs of tables became nodes."""
    pairs: dict[tuple[ir.Value, ir.Value], ir.Node] = {}
    for node in graph:
        if node.op_type == "GroupQueryAttention" and node.domain == CONTRIB and len(node.inputs) > _SIN:
            cos, sin = node.inputs[_COS], node.inputs[_SIN]
            if cos is not None and sin is not None:
                pairs.setdefault((cos, sin), node)
    count = 0
    for (cos, sin), first in pairs.items():
        cosines, sines = constant(cos), constant(sin)
        if cosines is None or sines is None or cosines.size < LEAST:
            continue
        found = find_frequencies(cosines, sines)
        if found is None:
            continue
        frequencies, factor = found
        name = f"rotary.{count}"
        ends = [
            new_initializer(graph, f"{name}.{key}", np.array(value, np.float32))
            for key, value in (("start", 0), ("limit", len(cosines)), ("delta", 1))
        ]
        axis = new_initializer(graph, f"{name}.axis", np.array([1], np.int64))
        row = new_initializer(graph, f"{name}.frequencies", frequencies[None])
        scale = (
            None if factor == 1 else new_initializer(graph, f"{name}.factor", np.array(factor, np.float32))
        )
        positions = insert(first, "Range", ends, {}, [ir.Value()]).outputs[0]
        column = insert(first, "Unsqueeze", [positions, axis], {}, [ir.Value()]).outputs[0]
        angle = insert(first, "Mul", [column, row], {}, [cos]).outputs[0]
        for old, op_type in ((cos, "Cos"), (sin, "Sin")):
            new = insert(first, op_type, [angle], {}, [old]).outputs[0]
            if scale is not None:
                new = insert(first, "Mul", [new, scale], {}, [old]).outputs[0]
            replace(old, new)
            graph.initializers.pop(old.name or "")
        count += 1
    return count


def find_frequencies(
    cos: NDArray[np.float32], sin: NDArray[np.float32]
) -> tuple[NDArray[np.float32], float] | None:
    """(float32 (D/2,), s) with cos = s cos(p f), sin = s sin(p f) at every row p; None if there are none.

    The angle of row 1 gives f roughly, that of rows ever further away more precisely, as long as the estimate
    before tells how often it went round. Of the float32 values nearby the one that fits best is taken.
    """
    factor = float(np.hypot(cos[0].astype(np.float64), sin[0]).mean())
    if factor <= 0 or np.abs(sin[0]).max() > TOLERANCE:
        return None
    angles = np.arctan2(sin.astype(np.float64), cos)
    estimate = angles[1]
    row = 2
    while row < len(cos):
        missed = angles[row] - row * estimate
        estimate = estimate + (missed - 2 * np.pi * np.round(missed / (2 * np.pi))) / row
        row *= 2
    rows = np.arange(len(cos), dtype=np.float32)[:, None]
    middle = estimate.astype(np.float32)
    candidates = [middle]
    for direction in (-np.inf, np.inf):
        near = middle
        for _ in range(2):
            near = np.nextafter(near, np.float32(direction))
            candidates.append(near)
    errors = []
    for each in candidates:
        turned = (rows * each).astype(np.float64)  # the product in float32, as models and the node form it
        wrong = np.maximum(np.abs(factor * np.cos(turned) - cos), np.abs(factor * np.sin(turned) - sin))
        errors.append(wrong.max(0))
    best = np.argmin(errors, axis=0)
    if np.min(errors, axis=0).max() > TOLERANCE * max(1.0, factor):
        return None
    return np.stack(candidates)[best, np.arange(len(middle))], factor
