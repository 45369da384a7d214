"""The same graph with whole runs of nodes as one: what the runtime's own kernels compute on a CPU.

Products with weights in blocks or with one scale a column, and what stands between them (norms, activations,
sums, attention over kept keys and values or of all tokens to each other) become one node, Fused of the
domain gemini, whose attributes list them as stages (`runtime/native/fused.c`). Which nodes go together
follows from the graph alone: those with the same number of other nodes behind them on the longest way from
its inputs, so that no way leaves a group and comes back. A whole decoder is two of them: the layers, and the
head behind the picking of positions; the layers of an encoder are one. The copy stores no weight again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_field
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from gemini.export.fusions.patterns import (
    CONTRIB,
    constant,
    dims,
    first_input,
    insert,
    only_user,
    produced_by,
    replace,
)

DOMAIN = "gemini"
# Of a product: places of codes, scales, zero points and bias; features, outputs, bits, block size.
WEIGHT_INTS = 8
BLOCKS = (32, 64, 128, 256)  # that the kernels know
# `enum Kind` of fused.c
PRODUCT, NORM, CENTRED_NORM, TIMES, PLUS, SILU, GELU, GELU_TANH, RELU, ATTENTION, LOOKUP, GAIN = range(12)
_NORMS = ("SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")
_BINARY = {"Mul": TIMES, "Add": PLUS}
Dims = tuple[str, ...]  # each a number, or the name of an axis
Shapes = Mapping[str, Dims]  # by the name of the value


@dataclass(frozen=True)
class Stage:
    """One entry of a Fused node: values read and written, constants, and sizes.

    ``reads`` and ``writes`` are activations, row by row; ``constants`` are in the order of the kind: codes,
    scales, zero points and bias of a product, gain and bias of a norm.
    """

    kind: int
    nodes: tuple[ir.Node, ...]
    reads: tuple[ir.Value, ...]
    writes: tuple[ir.Value | None, ...]
    constants: tuple[ir.Value | None, ...] = ()
    sizes: tuple[int, ...] = ()  # last dimension of what is read and written, if the stage says it
    # bits and block size of a product (0: one scale a column); the first six numbers of an attention
    packing: tuple[int, ...] = ()
    epsilon: float = 0.0
    # other inputs of an attention: past, tables, scales, mask, lengths
    tensors: tuple[ir.Value | None, ...] = ()
    present: tuple[ir.Value, ...] = ()  # keys and values with the new ones
    factors: tuple[float, ...] = ()  # scale, softcap, factor of cosines and sines
    column: int = 0  # the first that a product writes, of the value that several write side by side
    tables: tuple[
        tuple[Stage, int], ...
    ] = ()  # of a lookup: a product with the weights, the first token there


def known_shapes(model: ir.Model) -> dict[str, Dims]:
    """Dimensions of the graph's values as far as they are known: `finish` drops them."""
    values = [value for value in _activations(model.graph) if value.name]
    return {str(value.name): shape for value in values if (shape := dims(value)) is not None}


def fuse_stages(model: ir.Model, shapes: Shapes) -> ir.Model | None:
    """A copy of a finished graph with Fused nodes; None where it has no product for one.

    ``shapes``: dimensions of values by name, as far as tracing knew them.
    """
    copy = ir.from_proto(ir.to_proto(model))
    graph = copy.graph
    for name, value in graph.initializers.items():  # a proto does not say which folder stored ones lie in
        value.const_value = model.graph.initializers[name].const_value
    _gather_halves(graph)
    widths = {value: width for value in _activations(graph) if (width := _last(shapes.get(value.name or "")))}
    found = _stages(graph, widths, shapes)
    groups = [stages for stages in _groups(graph, found) if any(s.kind == PRODUCT for s in stages)]
    if not groups:
        return None
    _keep_in_halves(graph, [stage for stages in groups for stage in stages if stage.kind == ATTENTION])
    renewed: dict[ir.Value, ir.Value] = {}
    for index, stages in enumerate(groups):
        _replace(graph, _in_turns(stages), widths, renewed, f"Fused_{index}")
    copy.opset_imports[DOMAIN] = 1
    common.RemoveUnusedNodesPass()(copy)
    common.TopologicalSortPass()(copy)
    return copy


def _keep_in_halves(graph: ir.Graph, attentions: Sequence[Stage]) -> None:
    """Let past keys and values be float16 instead of float32, where all of them are read by Fused nodes.

    A step over many tokens waits for memory, and float16 is off by a two-thousandth; 8-bit ones stay.
    """
    past = [value for stage in attentions for value in stage.tensors[:2] if value is not None]
    if len(past) != sum((value.name or "").startswith("past.") for value in graph.inputs):
        return
    for value in (*past, *(value for stage in attentions for value in stage.present)):
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.FLOAT16)


def _gather_halves(graph: ir.Graph) -> None:
    """Let rows of an embedding be looked up with the scales as they are stored, float16, and be cast then.

    Otherwise onnxruntime casts all scales at load and keeps them a second time: 3.5 MB of 49 thousand
    tokens. The rows are rounded to float16, off by a two-thousandth where 8 bits are off by a 250th.
    """
    for node in list(graph):
        if node.op_type != "GatherBlockQuantized" or node.domain != CONTRIB:
            continue
        data, indices, scales, *zeros = node.inputs
        stored, rows = _stored(scales), node.outputs[0]
        if stored is scales or stored is None or stored.dtype != ir.DataType.FLOAT16:
            continue
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        gathered = insert(node, node.op_type, [data, indices, stored, *zeros], attributes, [rows], CONTRIB)
        halves = gathered.outputs[0]
        halves.type = ir.TensorType(ir.DataType.FLOAT16)
        (floats,) = insert(node, "Cast", [halves], {"to": ir.DataType.FLOAT}, [rows]).outputs
        name, rows.name = rows.name, None
        replace(rows, floats)
        floats.name = name  # shapes are known by name
        graph.remove(node, safe=True)


def _activations(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from (value for value in node.outputs if value.name)


def _last(shape: Dims | None) -> int:
    """The last dimension; 0 where it is not a number known beforehand."""
    return int(shape[-1]) if shape and len(shape) > 1 and shape[-1].isdigit() else 0


def _stages(graph: ir.Graph, widths: dict[ir.Value, int], shapes: Shapes) -> dict[ir.Node, Stage]:
    """The stage that each node belongs to; ``widths`` is completed with what the stages say."""
    found: dict[ir.Node, Stage] = {}
    for node in graph:
        if node in found:
            continue
        stage = _product(node) or _channels(node) or _norm(node) or _gain(node, widths)
        stage = stage or _silu(node, widths) or _alone(node, widths) or _binary(node, widths, shapes)
        stage = stage or _attention(node, found, shapes) or _attention_to_all(node, found, shapes)
        if stage is None:
            if parts := _side_by_side(node, found, shapes):
                found |= {n: part for part in parts for n in part.nodes}
                widths[node.outputs[0]] = sum(part.sizes[1] for part in parts)
            continue
        width = stage.sizes or (widths[stage.reads[0]],)
        widths |= dict.fromkeys(stage.reads, width[0])
        widths |= dict.fromkeys((value for value in stage.writes if value is not None), width[-1])
        found |= dict.fromkeys(stage.nodes, stage)
    products = {stage.constants[1]: stage for stage in found.values() if stage.kind == PRODUCT}
    for value in [value for stage in found.values() for value in stage.reads]:
        lookup = None if value.producer() in found else _lookup(value, products, shapes)
        if lookup is not None:
            found |= dict.fromkeys(lookup.nodes, lookup)
    return found


def _product(node: ir.Node) -> Stage | None:
    if node.op_type != "MatMulNBits" or node.domain != CONTRIB:
        return None
    k, n, bits, block = (node.attributes[name].as_int() for name in ("K", "N", "bits", "block_size"))
    x, *constants = (*node.inputs, None, None, None, None)[:6]
    codes, scales, zeros, groups, bias = constants
    scales = _stored(scales)
    fits = bits in (4, 8) and block in BLOCKS and groups is None and x is not None and not _is_constant(x)
    if not fits or not all(value is None or _is_constant(value) for value in (codes, scales, zeros, bias)):
        return None
    assert x is not None
    return Stage(
        PRODUCT, (node,), (x,), tuple(node.outputs), (codes, scales, zeros, bias), (k, n), (bits, block)
    )


def _channels(node: ir.Node) -> Stage | None:
    """A product with 8-bit weights and one scale a column, whose activations become codes in this call.

    The kernels find a range for each row. Ranges that were fixed in calibration serve onnxruntime alone: they
    are no better, and save nothing here.
    """
    x, *constants = (*node.inputs, None, None, None, None, None, None)[:7]
    nodes: tuple[ir.Node, ...] = (node,)
    if (node.domain, node.op_type) == (CONTRIB, "DynamicQuantizeMatMul"):
        codes, scales, zeros, bias = constants[:4]
    elif (node.domain, node.op_type) == (CONTRIB, "MatMulIntegerToFloat"):
        codes, _, scales, _, zeros, bias = constants
        rounding = produced_by(x, "QuantizeLinear")
        if rounding is None or only_user(x) is not node:
            return None
        x, nodes = rounding.inputs[0], (rounding, node)
    else:
        return None
    stored = None if codes is None else codes.const_value
    points = constant(zeros)
    if x is None or _is_constant(x) or stored is None or stored.dtype != ir.DataType.INT8 or scales is None:
        return None
    k, n = stored.shape.numpy()
    if not _is_vector(scales) or _size(scales) != n or (bias is not None and not _is_vector(bias)):
        return None
    if zeros is not None and (points is None or np.any(points)):
        return None
    return Stage(PRODUCT, nodes, (x,), tuple(node.outputs), (codes, scales, None, bias), (k, n), (8, 0))


def _gain(node: ir.Node, widths: dict[ir.Value, int]) -> Stage | None:
    """An activation times a number a channel."""
    if node.op_type != "Mul" or node.domain:
        return None
    for value, gain in (node.inputs, node.inputs[::-1]):
        if value in widths and gain is not None and _is_vector(gain) and _size(gain) == widths[value]:
            return Stage(GAIN, (node,), (value,), tuple(node.outputs), (gain, None))
    return None


def _side_by_side(node: ir.Node, found: Mapping[ir.Node, Stage], shapes: Shapes) -> list[Stage]:
    """Products whose results are laid side by side, as those of a head in parts: they write one value."""
    if node.op_type != "Concat" or node.domain:
        return []
    rank = len(shapes.get(node.outputs[0].name or "", ()))
    if node.attributes["axis"].as_int() not in (-1, rank - 1):
        return []
    parts: list[Stage] = []
    for value in node.inputs:
        producer = None if value is None else value.producer()
        part = None if producer is None else found.get(producer)
        if part is None or part.kind != PRODUCT or only_user(value) is not node:
            return []
        if parts and part.reads != parts[0].reads:
            return []
        column = sum(before.sizes[1] for before in parts)
        parts.append(replace_field(part, writes=(node.outputs[0],), column=column))
    parts[-1] = replace_field(parts[-1], nodes=(*parts[-1].nodes, node))
    return parts


Products = Mapping[ir.Value | None, Stage]  # by their scales


def _lookup(value: ir.Value, products: Products, shapes: Shapes) -> Stage | None:
    """Rows of an embedding, or of one in two parts, whose weights a product of the graph has, too.

    The kernels look them up where they are packed for that product; a lookup of its own would map the file
    that they come from, 64 KB a row.
    """
    where = produced_by(value, "Where")
    wanted = [value] if where is None else where.inputs[1:]
    parts = [part for rows in wanted if (part := _part(rows, products)) is not None]
    if len(parts) != len(wanted):
        return None
    ids, width = parts[0].ids, parts[0].table.sizes[0]
    nodes = [node for part in parts for node in part.nodes]
    starts = [0, parts[0].table.sizes[1]][: len(parts)]
    if where is not None:
        column = produced_by(where.inputs[0], "Unsqueeze")
        below = produced_by(None if column is None else column.inputs[0], "Less")
        if column is None or below is None or below.inputs[0] is not ids:
            return None
        if constant(below.inputs[1]) != starts[1] or not _is_chain([below, column, where]):
            return None
        nodes += [below, column, where]
    fits = [(part.ids, part.start, part.table.sizes[0]) for part in parts]
    if fits != [(ids, start, width) for start in starts] or len(shapes.get(ids.name or "", ())) != 2:
        return None
    tables = tuple((part.table, part.start) for part in parts)
    return Stage(LOOKUP, tuple(nodes), (), (value,), sizes=(width,), tensors=(ids,), tables=tables)


def _is_chain(nodes: Sequence[ir.Node]) -> bool:
    """Whether what each node makes is read by the next one alone."""
    return all(only_user(before.outputs[0]) is after for before, after in pairwise(nodes))


@dataclass(frozen=True)
class _Part:
    """Some rows of an embedding: the product that has them, the tokens asked for, the first one of them."""

    table: Stage
    ids: ir.Value
    start: int
    nodes: tuple[ir.Node, ...]


def _part(rows: ir.Value | None, products: Products) -> _Part | None:
    """Cast(GatherBlockQuantized(Clip(ids - start))), where the cast and the numbering may be missing."""
    cast = produced_by(rows, "Cast")
    gather = produced_by(rows if cast is None else cast.inputs[0], "GatherBlockQuantized", CONTRIB)
    if gather is None:
        return None
    data, indices, scales, zeros = (*gather.inputs, None)[:4]
    table = products.get(_stored(scales))
    if table is None or data is None or indices is None or table.constants[2] is not zeros:
        return None
    bits, block = (gather.attributes[name].as_int() for name in ("bits", "block_size"))
    k, n = table.sizes
    if table.packing != (bits, block) or k % block or not _same_bytes(data, table.constants[0]):
        return None
    start, ids, nodes = 0, indices, [gather] if cast is None else [gather, cast]
    clip = produced_by(indices, "Clip")
    moved = produced_by(None if clip is None else clip.inputs[0], "Sub")
    if clip is not None and moved is not None:
        first, limits = constant(moved.inputs[1]), [constant(value) for value in clip.inputs[1:]]
        if first is None or first.size != 1 or limits != [0, n - 1] or moved.inputs[0] is None:
            return None
        start, ids, nodes = int(first.item()), moved.inputs[0], [moved, clip, *nodes]
    if not _is_chain(nodes):
        return None
    return _Part(table, ids, start, tuple(nodes))


def _same_bytes(one: ir.Value, other: ir.Value | None) -> bool:
    """Whether two constants are stored in one place, or have equal numbers in whatever shape."""
    a, b = one.const_value, None if other is None else other.const_value
    if isinstance(a, ir.ExternalTensor) and isinstance(b, ir.ExternalTensor):
        return (a.location, a.offset, a.length) == (b.location, b.offset, b.length)
    return a is not None and b is not None and np.array_equal(a.numpy().ravel(), b.numpy().ravel())


def _norm(node: ir.Node) -> Stage | None:
    if node.op_type not in (*_NORMS, "LayerNormalization"):
        return None
    axis, epsilon = node.attributes.get("axis"), node.attributes.get("epsilon")
    skips, centred = node.op_type == _NORMS[0], node.op_type == "LayerNormalization"
    reads, (gain, *others) = node.inputs[: 1 + skips], node.inputs[1 + skips :]
    bias = others[0] if centred and others else None
    outputs = [value if value.name else None for value in node.outputs]
    writes = (outputs[0], outputs[3] if skips and len(outputs) > 3 else None)
    unknown = [*outputs[1 : 3 if skips else None], *others[bool(bias) :]]
    if (axis is not None and axis.as_int() != -1) or any(value is not None for value in unknown):
        return None
    activations = [value for value in reads if value is not None and not _is_constant(value)]
    if len(activations) != 1 + skips or not all(_is_vector(value) for value in (gain, bias) if value):
        return None
    assert gain is not None
    number = 1e-5 if epsilon is None else epsilon.as_float()
    kind = CENTRED_NORM if centred else NORM
    return Stage(kind, (node,), tuple(activations), writes, (gain, bias), (_size(gain),), epsilon=number)


def _size(value: ir.Value) -> int:
    """How many numbers a constant has."""
    assert value.const_value is not None
    return int(value.const_value.size)


def _is_vector(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 1


def _silu(node: ir.Node, widths: dict[ir.Value, int]) -> Stage | None:
    """x * Sigmoid(x), found at the product."""
    if node.op_type != "Mul" or node.domain:
        return None
    for value, gate in (node.inputs, node.inputs[::-1]):
        sigmoid = produced_by(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is value and only_user(gate) is node and value in widths:
            return Stage(SILU, (sigmoid, node), (value,), tuple(node.outputs))
    return None


def _alone(node: ir.Node, widths: dict[ir.Value, int]) -> Stage | None:
    """An activation of one operator."""
    if node.op_type not in ("Gelu", "Relu") or node.domain or (value := first_input(node)) not in widths:
        return None
    approximate = node.attributes.get("approximate")
    tanh = approximate is not None and approximate.as_string() == "tanh"
    kind = RELU if node.op_type == "Relu" else GELU_TANH if tanh else GELU
    return Stage(kind, (node,), (value,), tuple(node.outputs))


def _binary(node: ir.Node, widths: dict[ir.Value, int], shapes: Shapes) -> Stage | None:
    """A sum or product of two activations of one shape: whatever is broadcast is none of these."""
    if node.op_type not in _BINARY or node.domain:
        return None
    a, b = node.inputs
    if a is None or b is None or a not in widths or widths[a] != widths.get(b):
        return None
    shape = shapes.get(a.name or "")
    if shape is None or shape != shapes.get(b.name or ""):
        return None
    return Stage(_BINARY[node.op_type], (node,), (a, b), tuple(node.outputs))


# Attributes of GroupQueryAttention that the kernels know, and inputs: packed queries, keys and values, past
# keys and values, lengths, tables, scales of codes.
_KNOWN = (
    "num_heads",
    "kv_num_heads",
    "scale",
    "softcap",
    "local_window_size",
    "do_rotary",
    "rotary_interleaved",
)
_QUANTIZED = ("k_quant_type", "v_quant_type", "kv_cache_bit_width")
_QKV, _PAST, _LENGTHS, _TABLES, _SCALES = (0,), (3, 4), (5, 6), (7, 8), (12, 13)
_WIDEST_HEAD = 256


def _attention(node: ir.Node, found: Mapping[ir.Node, Stage], shapes: Shapes) -> Stage | None:
    """Attention over kept keys and values whose queries, keys and values are one product here."""
    if node.op_type != "GroupQueryAttention" or node.domain != CONTRIB:
        return None
    inputs = dict(enumerate(node.inputs))
    known = (*_QKV, *_PAST, *_LENGTHS, *_TABLES, *_SCALES)
    packed, past = inputs[_QKV[0]], [inputs[i] for i in _PAST]
    source = None if packed is None else packed.producer()
    number = {
        name: node.attributes[name].as_int() for name in _KNOWN[:2] + _KNOWN[4:] if name in node.attributes
    }
    heads, kv_heads = number["num_heads"], number["kv_num_heads"]
    shape = shapes.get(past[0].name or "") if past[0] is not None else None
    if (
        any(inputs[i] is not None for i in inputs if i not in known)
        or not set(node.attributes) <= {*_KNOWN, *_QUANTIZED}
        or node.attributes.get("kv_cache_bit_width", ir.AttrInt64("", 8)).as_int() != 8
        or source not in found
        or only_user(packed) is not node
        or shape is None
        or not shape[-1].isdigit()
    ):
        return None
    dim = int(shape[-1])
    assert packed is not None
    if dim % 8 or dim > _WIDEST_HEAD or len(shapes.get(packed.name or "", ())) != 3:
        return None
    factor = {
        name: node.attributes[name].as_float() for name in ("scale", "softcap") if name in node.attributes
    }
    rotary = number.get("do_rotary", 0) * (1 + number.get("rotary_interleaved", 0))
    tables = [inputs.get(i) if rotary else None for i in _TABLES]
    frequencies, turned = _frequencies(*tables) or (None, 1.0)
    if frequencies is not None:
        tables = [frequencies, None]
    others = [*(inputs.get(i) for i in _PAST), *tables, *(inputs.get(i) for i in _SCALES)]
    return Stage(
        ATTENTION,
        (node,),
        (packed,),
        tuple(node.outputs[:1]),
        sizes=((heads + 2 * kv_heads) * dim, heads * dim),
        packing=(
            heads,
            kv_heads,
            dim,
            rotary,
            max(0, number.get("local_window_size", 0)),
            0 if frequencies is None else _size(frequencies),
        ),
        tensors=(*others, None, *(inputs[i] for i in _LENGTHS)),
        present=tuple(node.outputs[1:3]),
        factors=(factor.get("scale", 0.0) or dim**-0.5, factor.get("softcap", 0.0), turned),
    )


def _attention_to_all(node: ir.Node, found: Mapping[ir.Node, Stage], shapes: Shapes) -> Stage | None:
    """Attention of the tokens of a row to each other, as encoders have it, over the parts of one product."""
    if node.op_type != "Attention" or node.domain:
        return None
    queries, keys, values, mask, *others = (*node.inputs, None)
    number = {name: attribute.value for name, attribute in node.attributes.items()}
    heads, kv_heads = number.pop("q_num_heads", 0), number.pop("kv_num_heads", 0)
    scale = number.pop("scale", 0.0)
    split = produced_by(queries, "Split")
    if split is None or any(number.values()) or any(value is not None for value in others) or not heads:
        return None
    packed = split.inputs[0]
    source = None if packed is None else packed.producer()
    parts = (queries, keys, values)
    width = [_last(shapes.get(value.name or "")) for value in parts if value is not None]
    dim = width[0] // heads if width else 0
    if (
        tuple(split.outputs) != parts
        or packed is None
        or source not in found
        or only_user(packed) is not split
        or any(only_user(value) is not node for value in split.outputs)
        or any(value.name and value.uses() for value in node.outputs[1:])
        or len(shapes.get(packed.name or "", ())) != 3
        or width != [heads * dim, kv_heads * dim, kv_heads * dim]
        or dim % 8
        or not 8 <= dim <= _WIDEST_HEAD
        or (mask is not None and len(shapes.get(mask.name or "", ())) != 4)  # float32, as our twins write it
    ):
        return None
    return Stage(
        ATTENTION,
        (split, node),
        (packed,),
        tuple(node.outputs[:1]),
        sizes=(sum(width), width[0]),
        packing=(heads, kv_heads, dim, 0, 0, 0),
        tensors=(*[None] * 6, mask, None, None),
        factors=(scale or dim**-0.5, 0.0, 1.0),
    )


def _frequencies(cos: ir.Value | None, sin: ir.Value | None) -> tuple[ir.Value, float] | None:
    """What `compute_rotary_tables` made the tables of, constant frequencies and a factor, if it made them.

    The kernels turn the positions of a call by them; whole tables would be in memory for every position that
    the model knows, 67 MB with 131 thousand of them.
    """
    found = []
    for table, op_type in ((cos, "Cos"), (sin, "Sin")):
        scaled = produced_by(table, "Mul")
        factor = None if scaled is None else constant(scaled.inputs[1])
        node = produced_by(table if scaled is None else scaled.inputs[0], op_type)
        angle = produced_by(None if node is None else node.inputs[0], "Mul")
        if angle is None or (scaled is not None and (factor is None or factor.size != 1)):
            return None
        column = produced_by(angle.inputs[0], "Unsqueeze")
        positions = produced_by(None if column is None else column.inputs[0], "Range")
        if positions is None or [constant(value) for value in positions.inputs[::2]] != [0, 1]:
            return None
        found.append((angle.inputs[1], 1.0 if factor is None else float(factor.item())))
    frequencies, factor_of_both = found[0]
    if found[0] != found[1] or frequencies is None or not _is_constant(frequencies):
        return None
    return frequencies, factor_of_both


def _stored(value: ir.Value | None) -> ir.Value | None:
    """Scales as they are stored: the kernels read float16 themselves."""
    cast = produced_by(value, "Cast")
    return value if cast is None else cast.inputs[0]


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None


def _groups(graph: ir.Graph, found: dict[ir.Node, Stage]) -> list[list[Stage]]:
    """Stages that are joined by values and have the same level, in the graph's order.

    The level of a stage is the largest number of changes from stages to other nodes and back on a way to it.
    """
    levels: dict[ir.Node, int] = {}
    for node in graph:
        before = [value.producer() for value in node.inputs if value is not None]
        steps = [
            levels[other] + (node in found and other not in found) for other in before if other is not None
        ]
        levels[node] = max(steps, default=-1)  # -1: behind no stage
        if node in found:
            levels[node] = max(levels[node], 0)
    for stage in found.values():  # the nodes of a stage stand together
        level = max(levels[node] for node in stage.nodes)
        levels |= dict.fromkeys(stage.nodes, level)
    groups: dict[ir.Node, list[Stage]] = {}
    leader: dict[ir.Node, ir.Node] = {}

    def first(node: ir.Node) -> ir.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    stages = list(dict.fromkeys(found[node] for node in graph if node in found))
    for stage in stages:
        last = stage.nodes[-1]
        leader[last] = last
        neighbours = [value.producer() for value in stage.reads]
        neighbours += [use.node for value in stage.reads for use in value.uses()]
        for other in neighbours:
            if other is None or other not in found:
                continue
            other = found[other].nodes[-1]
            if other in leader and levels[other] == levels[last]:
                leader[first(other)] = first(last)
    for stage in stages:
        groups.setdefault(first(stage.nodes[-1]), []).append(stage)
    return list(groups.values())


def _in_turns(stages: Sequence[Stage]) -> list[Stage]:
    """The same stages: whatever rows can do before the next products, then all products that are ready."""
    waiting, ordered, products = list(stages), list[Stage](), False
    inside = {value for stage in stages for value in stage.writes}
    while waiting:
        ready = [s for s in waiting if (s.kind == PRODUCT) == products and inside.isdisjoint(s.reads)]
        first = {value: place for place, s in reversed(list(enumerate(ready))) for value in s.writes}
        # Products that write one value follow each other in the order of its columns.
        ordered += sorted(ready, key=lambda s: (first[s.writes[0]], s.column))
        waiting = [s for s in waiting if s not in ready]
        inside -= {value for stage in ready for value in stage.writes}
        if products or not ready:
            products = not products
    return ordered


def _replace(
    graph: ir.Graph,
    stages: Sequence[Stage],
    widths: dict[ir.Value, int],
    renewed: dict[ir.Value, ir.Value],
    name: str,
) -> None:
    """Put one node in the place of the stages; ``renewed``: what earlier ones made, by what it replaced."""
    nodes = {node for stage in stages for node in stage.nodes}
    made = {value: None for stage in stages for value in stage.writes if value is not None}
    inputs = dict.fromkeys(v for stage in stages for v in stage.reads if v not in made)
    outputs = [
        value
        for value in made
        if value.is_graph_output() or any(use.node not in nodes for use in value.uses())
    ]
    place = {value: index for index, value in enumerate((*inputs, *made))}
    attentions = [stage for stage in stages if stage.kind == ATTENTION]
    further = [value for stage in stages for value in (*stage.constants, *stage.tensors)]
    further += [value for stage in stages for table, _ in stage.tables for value in table.constants]
    others = dict.fromkeys(value for value in further if value is not None)
    position = {value: len(inputs) + index for index, value in enumerate(others)}
    entries: list[int] = []
    weights: list[int] = []

    def held(product: Stage) -> list[int]:
        return [-1 if value is None else position[value] for value in product.constants]

    for stage in stages:
        reads = [place[value] for value in stage.reads]
        writes = [-1 if value is None else place[value] for value in stage.writes]
        for table, first in stage.tables:
            entries += [LOOKUP, -1, -1, writes[0], -1, len(weights) // WEIGHT_INTS, first]
            weights += [*held(table), *table.sizes, *table.packing]
        if stage.kind == LOOKUP:
            continue
        extra = [*held(stage), -1, -1][:2]
        if stage.kind == PRODUCT:
            extra = [len(weights) // WEIGHT_INTS, stage.column]
            weights += [*held(stage), *stage.sizes, *stage.packing]
        elif stage.kind == ATTENTION:
            extra = [attentions.index(stage), -1]
        entries += [stage.kind, *[*reads, -1][:2], *[*writes, -1][:2], *extra]
    ids = [position[value] for stage in stages if stage.kind == LOOKUP for value in stage.tensors if value]
    kept = [value for stage in attentions for value in stage.present]
    tensors = [[-1 if v is None else position[v] for v in stage.tensors] for stage in attentions]
    fused = ir.Node(
        DOMAIN,
        "Fused",
        [*(renewed.get(value, value) for value in inputs), *others],
        attributes=[
            ir.AttrInt64s("widths", [widths[value] for value in place]),
            ir.AttrInt64s("outputs", [place[value] for value in outputs]),
            ir.AttrInt64s("stages", entries),
            ir.AttrInt64s("weights", weights),
            ir.AttrFloat32s("epsilons", [s.epsilon for s in stages for _ in s.tables or (s,)]),
            ir.AttrInt64s(
                "attentions",
                [
                    n
                    for stage, at in zip(attentions, tensors, strict=True)
                    for n in (*stage.packing, *at[:-2])
                ],
            ),
            ir.AttrFloat32s("factors", [number for stage in attentions for number in stage.factors]),
            ir.AttrInt64s("lengths", [place for place in tensors[0][-2:] if place >= 0] if tensors else []),
            ir.AttrInt64s("ids", ids[:1]),
        ],
        num_outputs=len(outputs) + len(kept),
        name=name,
    )
    outputs += kept
    last = [node for node in graph if node in nodes][-1]
    graph.insert_before(last, fused)
    for old, new in zip(outputs, fused.outputs, strict=True):
        # The operator does not say what it makes: keys and values may be codes.
        new.shape = old.shape if old.is_graph_output() else None
        new.type = old.type or ir.TensorType(ir.DataType.FLOAT)
        replace(old, new)
        renewed[old] = new
    graph.remove([node for node in graph if node in nodes], safe=True)
