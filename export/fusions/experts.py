"""What stands around experts: a router that the operator has inside, and reshapes that it does not need.

    Softmax -> TopK -> values / sum(values) -> ScatterElements -> QMoE(x, routed, …, routed)
        ->  QMoE(x, logits, …)
    Reshape (B, S, H) to (B * S, H) -> QMoE -> Reshape back  ->  QMoE

Without weights of a router the operator takes a softmax of the k largest of what it is given. A router of any
other kind stays in front of it, as one whose weights do not sum to 1.
"""

from __future__ import annotations

import onnx_ir as ir

from gemini.export.fusions.patterns import constant, dims, first_input, like, only_user, produced_by, replace

_ROUTED, ROUTER_WEIGHTS = 1, 14  # inputs of QMoE: what experts are chosen by, and what they are weighed with
_SHARES = "normalize_routing_weights"
_FLOAT = int(ir.DataType.FLOAT)


def fuse_router(graph: ir.Graph) -> int:
    """Returns how many routers went into their operator."""
    count = 0
    for node in graph:
        if node.op_type != "QMoE" or len(node.inputs) <= ROUTER_WEIGHTS:
            continue
        logits = _logits(node)
        if logits is None:
            continue
        node.replace_input_with(_ROUTED, logits)
        node.resize_inputs(_last(node) + 1)
        node.attributes[_SHARES] = ir.AttrInt64(_SHARES, 1)
        count += 1
    return count


def keep_sequences(graph: ir.Graph) -> int:
    """Returns how many operators over experts take (B, S, H) instead of rows."""
    count = 0
    for node in graph:
        if node.op_type != "QMoE" or len(node.inputs) > ROUTER_WEIGHTS:  # weights have a row for each
            continue
        flat, back = produced_by(node.inputs[0], "Reshape"), only_user(node.outputs[0])
        if flat is None or back is None or back.op_type != "Reshape":
            continue
        before, after = dims(flat.inputs[0]), dims(back.outputs[0])
        if (
            before is None
            or len(before) != 3
            or before != after
            or (dims(flat.outputs[0]) or ())[1:] != before[2:]
        ):
            continue
        node.replace_input_with(0, flat.inputs[0])
        like(node.outputs[0], back.outputs[0])
        replace(back.outputs[0], node.outputs[0])
        count += 1
    return count


def _logits(node: ir.Node) -> ir.Value | None:
    """What a router begins with that weighs experts as the operator does; None for any other."""
    scatter = produced_by(node.inputs[_ROUTED], "ScatterElements")
    if scatter is None or node.inputs[ROUTER_WEIGHTS] is not node.inputs[_ROUTED]:
        return None
    ground, chosen, weights = scatter.inputs
    zeros = produced_by(ground, "Expand")
    none = constant(ground if zeros is None else zeros.inputs[0])
    picked = produced_by(chosen, "TopK")
    if none is None or none.any() or picked is None or not _is_best(picked, node):
        return None
    best, scores = picked.outputs[0], _plain(picked.inputs[0])
    shares = produced_by(_plain(weights), "Softmax")
    if shares is not None and _over_last(shares) and _plain(shares.inputs[0]) is best:
        return scores
    chances, ratio = produced_by(scores, "Softmax"), produced_by(_plain(weights), "Div")
    total = None if ratio is None else produced_by(ratio.inputs[1], "ReduceSum")
    if chances is None or not _over_last(chances) or ratio is None or total is None:
        return None
    whole = _plain(ratio.inputs[0]) is best and _plain(total.inputs[0]) is best
    return _plain(chances.inputs[0]) if whole else None


def _plain(value: ir.Value | None) -> ir.Value:
    """The value before a cast to the type that everything here has."""
    cast = produced_by(value, "Cast")
    if cast is not None and cast.attributes["to"].as_int() == _FLOAT:
        return first_input(cast)
    assert value is not None
    return value


def _is_best(picked: ir.Node, node: ir.Node) -> bool:
    """Whether a TopK takes as many of the largest entries of a row as the operator does."""
    count = constant(picked.inputs[1])
    largest, axis = picked.attributes.get("largest"), picked.attributes.get("axis")
    return (
        count is not None
        and int(count.reshape(-1)[0]) == node.attributes["k"].as_int()
        and (largest is None or largest.as_int() == 1)
        and (axis is None or axis.as_int() in (-1, 1))
    )


def _over_last(softmax: ir.Node) -> bool:
    axis = softmax.attributes.get("axis")
    return axis is None or axis.as_int() in (-1, 1)


def _last(node: ir.Node) -> int:
    """The place of the last input that there is before the weights."""
    return max(place for place, value in enumerate(node.inputs[:ROUTER_WEIGHTS]) if value is not None)
