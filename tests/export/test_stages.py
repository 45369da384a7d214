"""Fused nodes: the numbers of numpy and of onnxruntime's operators, whole graphs, and what is refused."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fused_nodes import CONTRIB, FLOAT, change_attribute, fused, model_of, session
from onnx import TensorProto, helper, numpy_helper

from gemini.compress.apply import run_recipe
from gemini.compress.recipe import load_recipe
from gemini.export import exporter, stages
from gemini.export.exporter import export_checkpoint
from gemini.export.stages import LOOKUP, PRODUCT, fuse_stages
from gemini.export.verify import DecoderRun, open_graph
from gemini.runtime import kernels
from gemini.runtime.schema import LayerShape

pytestmark = pytest.mark.skipif(
    not kernels.available(), reason="the kernels are not built or do not fit here"
)

HALF = TensorProto.FLOAT16
EXACT = 1e-5  # of float32 sums in another order


def in_8_bits(x):
    """Activations as the kernels round them: 32 share a scale; float32 like theirs."""
    rows, k = x.shape
    padded = np.zeros((rows, -(-k // 32) * 32), np.float32)
    padded[:, :k] = x
    groups = padded.reshape(rows, -1, 32)
    top = np.abs(groups).max(-1, keepdims=True)
    codes = np.rint(groups * np.where(top > 0, np.float32(127) / np.where(top > 0, top, 1), 0))
    return (codes * (top / np.float32(127))).reshape(rows, -1)[:, :k].astype(np.float64)


def weights(rng, k, n, bits, block, zeros, half, bias):
    """(constants of MatMulNBits by name, the float64 matrix (n, k) that they say)."""
    blocks = -(-k // block)
    codes = rng.integers(0, 256, (n, blocks, block * bits // 8), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.03, (n, blocks)).astype(np.float16 if half else np.float32)
    points = np.full((n, blocks), 8 if bits == 4 else 128)
    constants = {"codes": codes, "scales": scales}
    if zeros:
        stored = rng.integers(0, 256, (n, blocks if bits == 8 else (blocks + 1) // 2), dtype=np.uint8)
        constants["zeros"] = stored
        points = stored if bits == 8 else np.stack([stored & 15, stored >> 4], -1).reshape(n, -1)[:, :blocks]
    if bias:
        constants["bias"] = rng.standard_normal(n).astype(np.float32)
    whole = codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(n, blocks, block)
    matrix = (whole.astype(np.float64) - points[..., None]) * scales[..., None].astype(np.float64)
    return constants, matrix.reshape(n, -1)[:, :k]


def product(k, n, bits, block, constants, x="x", y="y", prefix=""):
    names = [name if name in constants else "" for name in (f"{prefix}{p}" for p in ("zeros", "", "bias"))]
    scales, nodes = f"{prefix}scales", []
    if constants[scales].dtype == np.float16:
        nodes = [helper.make_node("Cast", [scales], [f"{scales}/wide"], to=FLOAT)]
        scales += "/wide"
    inputs = [x, f"{prefix}codes", scales, *names]
    while not inputs[-1]:
        inputs.pop()
    options = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 4}
    return [*nodes, helper.make_node("MatMulNBits", inputs, [y], domain=CONTRIB, **options)]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_are_those_of_rounded_activations(bits, block, half, zeros, instructions):
    rng = np.random.default_rng(bits + block)
    for k, n in ((64, 8), (96, 21), (200, 40), (33, 3), (576, 100)):
        constants, matrix = weights(rng, k, n, bits, block, zeros, half, bias=n % 2 == 0)
        model = model_of(
            product(k, n, bits, block, constants), {"x": ["b", "s", k]}, {"y": ["b", "s", n]}, constants
        )
        run = session(fused(model))
        assert [node.op_type for node in fused(model).graph.node] == ["Fused"]
        for batch, length in ((1, 1), (1, 2), (3, 1), (1, 4), (1, 7), (2, 8), (1, 19)):
            x = rng.standard_normal((batch, length, k)).astype(np.float32)
            (y,) = run.run(None, {"x": x})
            expected = in_8_bits(x.reshape(-1, k)) @ matrix.T + constants.get("bias", 0)
            assert y.shape == (batch, length, n)
            difference = np.abs(y.reshape(-1, n) - expected).max()
            assert difference <= EXACT * np.abs(expected).max(), (k, n, batch, length)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_as_large_as_can_be_do_not_leave_16_bits(bits, zeros, instructions):
    """Sums of 16 codes with activations of one sign or both, at either end of their ranges."""
    rng = np.random.default_rng(bits)
    k, n, block = 96, 24, 32
    constants, _ = weights(rng, k, n, bits, block, zeros, False, False)
    constants["scales"][:] = 1.0
    codes, ends = constants["codes"], np.array([0, 255], np.uint8)
    codes[:8] = ends[rng.integers(0, 2, codes[:8].shape)]
    codes[8:12], codes[12:16] = 0, 255
    codes[16:20, :, ::2], codes[16:20, :, 1::2] = 0, 255
    codes[20:, :, : codes.shape[2] // 2], codes[20:, :, codes.shape[2] // 2 :] = 255, 0
    whole = codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(n, -1, block)
    points = np.full((n, k // block), 8 if bits == 4 else 128)
    if zeros:
        constants["zeros"][:] = 0 if bits == 4 else 255
        points[:] = 0 if bits == 4 else 255
    matrix = (whole.astype(np.float64) - points[..., None]).reshape(n, -1)
    model = model_of(
        product(k, n, bits, block, constants), {"x": ["b", "s", k]}, {"y": ["b", "s", n]}, constants
    )
    run = session(fused(model))
    x = rng.choice([-127.0, 127.0], (20, k)).astype(np.float32)
    x[0], x[1], x[2, ::2], x[3, :16], x[4, 16:] = 127, -127, 127, -127, 127
    for rows in (1, 2, 3, 5, 20):
        (y,) = run.run(None, {"x": x[None, :rows]})
        np.testing.assert_array_equal(y[0], x[:rows].astype(np.float64) @ matrix.T)


def test_a_row_of_zeros_stays_zero_and_empty_input_gives_an_empty_result(instructions):
    constants, _ = weights(np.random.default_rng(0), 64, 8, 4, 32, True, True, False)
    model = model_of(product(64, 8, 4, 32, constants), {"x": ["b", "s", 64]}, {"y": ["b", "s", 8]}, constants)
    run = session(fused(model))
    assert not run.run(None, {"x": np.zeros((1, 3, 64), np.float32)})[0].any()
    assert run.run(None, {"x": np.zeros((1, 0, 64), np.float32)})[0].shape == (1, 0, 8)


def chain(middle, width=48, extra=None, outputs=("z",)):
    """x -> product -> u -> `middle` -> v -> product -> z, and what numpy makes of it given v of u and x."""
    rng = np.random.default_rng(7)
    first, a = weights(rng, width, width, 8, 32, False, False, True)
    second, b = weights(rng, width, width, 4, 32, True, True, False)
    constants = {f"1{name}": array for name, array in first.items()}
    constants |= {f"2{name}": array for name, array in second.items()} | (extra or {})
    nodes = product(width, width, 8, 32, constants, "x", "u", "1") + middle
    nodes += product(width, width, 4, 32, constants, "v", "z", "2")
    model = model_of(
        nodes,
        {name: ["b", "s", width] for name in ("x", "skip")},
        {name: ["b", "s", width] for name in outputs},
        constants,
    )
    return (
        model,
        lambda x: in_8_bits(x) @ a.T + first["bias"],
        lambda v: in_8_bits(v.astype(np.float32)) @ b.T,
    )


def rms(x, gain, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * gain


def centred(x, gain, bias, epsilon):
    middle = x - x.mean(-1, keepdims=True)
    return middle / np.sqrt((middle * middle).mean(-1, keepdims=True) + epsilon) * gain + bias


def erf(x):
    return np.vectorize(math.erf)(x)


GAIN = np.random.default_rng(1).uniform(0.5, 2, 48).astype(np.float32)
BIAS = np.random.default_rng(2).standard_normal(48).astype(np.float32)
CUBE = math.sqrt(2 / math.pi)
MIDDLES = {
    "rms norm": (
        [("RMSNormalization", ["u", "gain"], "v", {"epsilon": 1e-6})],
        lambda u, s: rms(u, GAIN, 1e-6),
    ),
    "skip norm": (
        [("SkipSimplifiedLayerNormalization", ["u", "skip", "gain"], "v", {"epsilon": 1e-5})],
        lambda u, s: rms(u + s, GAIN, 1e-5),
    ),
    "layer norm": (
        [("LayerNormalization", ["u", "gain", "bias"], "v", {"epsilon": 1e-5})],
        lambda u, s: centred(u, GAIN, BIAS, 1e-5),
    ),
    "silu": (
        [("Sigmoid", ["u"], "g", {}), ("Mul", ["u", "g"], "v", {})],
        lambda u, s: u / (1 + np.exp(-u)),
    ),
    "gelu": ([("Gelu", ["u"], "v", {})], lambda u, s: u / 2 * (1 + erf(u / math.sqrt(2)))),
    "gelu by tanh": (
        [("Gelu", ["u"], "v", {"approximate": "tanh"})],
        lambda u, s: u / 2 * (1 + np.tanh(CUBE * (u + 0.044715 * u**3))),
    ),
    "relu": ([("Relu", ["u"], "v", {})], lambda u, s: np.maximum(u, 0)),
    "sum": ([("Add", ["skip", "u"], "v", {})], lambda u, s: u + s),
    "product": ([("Mul", ["u", "skip"], "v", {})], lambda u, s: u * s),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_what_stands_between_products_is_what_numpy_computes(name):
    parts, reference = MIDDLES[name]
    domains = {"SkipSimplifiedLayerNormalization": CONTRIB}
    middle = [
        helper.make_node(kind, reads, [makes], domain=domains.get(kind, ""), **options)
        for kind, reads, makes, options in parts
    ]
    model, before, after = chain(middle, extra={"gain": GAIN, "bias": BIAS}, outputs=("u", "v", "z"))
    proto = fused(model, dict.fromkeys("uvgz", 48))
    assert [node.op_type for node in proto.graph.node] == ["Fused"]
    run = session(proto)
    rng = np.random.default_rng(3)
    for length in (1, 5, 40):
        x, skip = rng.standard_normal((2, 1, length, 48)).astype(np.float32)
        x *= 0.2
        # `skip` is no input of the fused graph where the middle does not read it.
        u, v, z = run.run(None, {"x": x, "skip": skip})
        np.testing.assert_allclose(u[0], before(x[0]), atol=1e-4, rtol=EXACT)
        np.testing.assert_allclose(v[0], reference(u[0].astype(np.float64), skip[0]), atol=2e-6, rtol=5e-6)
        np.testing.assert_allclose(z[0], after(v[0]), atol=1e-4, rtol=EXACT)


def test_what_is_broadcast_or_constant_is_no_stage():
    for reads, extra in ((["u", "one"], {"one": np.ones((1, 1, 48), np.float32)}), (["u", "skip"], {})):
        model, _, _ = chain([helper.make_node("Add", reads, ["v"])], extra=extra)
        shapes = {"u": ("b", "s", "48"), "v": ("b", "s", "48"), "skip": ("1", "s", "48")}
        copy = fuse_stages(ir.from_proto(model), shapes)
        assert sorted(node.op_type for node in copy.graph) == ["Add", "Fused", "Fused"]


def test_a_way_out_and_back_divides_a_group():
    # u goes to the second product directly and through a Softmax: both in one node would wait for each other.
    middle = [helper.make_node("Softmax", ["u"], ["w"]), helper.make_node("Add", ["u", "w"], ["v"])]
    model, before, after = chain(middle)
    proto = fused(model, dict.fromkeys("uvwz", 48))
    assert sorted(node.op_type for node in proto.graph.node) == ["Fused", "Fused", "Softmax"]
    x = np.random.default_rng(0).standard_normal((1, 3, 48)).astype(np.float32)
    (z,) = session(proto).run(None, {"x": x, "skip": x})
    u = before(x[0])
    shifted = np.exp(u - u.max(-1, keepdims=True))
    np.testing.assert_allclose(
        z[0], after(u + shifted / shifted.sum(-1, keepdims=True)), atol=1e-2, rtol=1e-2
    )


def test_two_threads_may_run_one_session(instructions):
    model, _, _ = chain([helper.make_node("Relu", ["u"], ["v"])])
    run = session(fused(model, dict.fromkeys("uvz", 48)))
    rng = np.random.default_rng(0)
    feeds = [
        {n: rng.standard_normal((1, 1 + i % 5, 48)).astype(np.float32) for n in ("x", "skip")}
        for i in range(40)
    ]
    alone = [run.run(None, feed)[0] for feed in feeds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda feed: run.run(None, feed)[0], feeds * 5))
    for index, result in enumerate(together):
        np.testing.assert_array_equal(result, alone[index % len(feeds)])


# ---- attention, beside onnxruntime's own operator ----


def identity(width):
    """A product that gives back integers from -127 to 127 as they are, where one of each 32 is as large."""
    codes = np.full((width, -(-width // 32), 32), 128, np.uint8)
    for i in range(width):
        codes[i, i // 32, i % 32] = 129
    return {"qcodes": codes, "qscales": np.ones((width, codes.shape[1]), np.float32)}


def attention_model(heads, kv_heads, dim, codes=None, rotary=0, tables=None, factor=None, **options):
    """x -> identity product -> GroupQueryAttention -> y; keys and values are float32, or codes.

    ``factor``: the cosines and sines are computed, times this, as `compute_rotary_tables` writes it.
    """
    width = (heads + 2 * kv_heads) * dim
    constants = identity(width)
    inputs = ["u", "", "", "past.0.key", "past.0.value", "seqlens_k", "total_sequence_length"]
    if rotary:
        if factor is None:
            constants |= dict(zip(("cos", "sin"), tables, strict=True))
        inputs += ["cos", "sin"]
        options |= {"do_rotary": 1, "rotary_interleaved": rotary - 1}
    kind = FLOAT
    if codes is not None:
        kind = TensorProto.INT8
        scale = np.full((kv_heads, 1, dim) if codes == "PER_CHANNEL" else (1,), 1.7, np.float32)
        constants |= {"key_scale": scale, "value_scale": (scale * 0.9).astype(np.float32)}
        inputs += [""] * (12 - len(inputs)) + ["key_scale", "value_scale"]
        options |= {"k_quant_type": codes, "v_quant_type": codes, "kv_cache_bit_width": 8}
    outputs = ["y", "present.0.key", "present.0.value"]
    nodes = product(width, width, 8, 32, {n: constants[n] for n in ("qcodes", "qscales")}, "x", "u", "q")
    if factor is not None:
        constants |= frequencies_of(dim // 2) | {"factor": np.array(factor, np.float32)}
        nodes = [*computed_tables(factor), *nodes]
    attention = helper.make_node(
        "GroupQueryAttention",
        inputs,
        outputs,
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=kv_heads,
        **options,
    )
    shape = ["b", kv_heads, "past", dim]
    lengths = {"seqlens_k": (TensorProto.INT32, ["b"]), "total_sequence_length": (TensorProto.INT32, [])}
    return model_of(
        [*nodes, attention],
        {
            "x": ["b", "s", width],
            **{name: (kind, shape) for name in ("past.0.key", "past.0.value")},
            **lengths,
        },
        {"y": ["b", "s", heads * dim], **{name: (kind, shape) for name in outputs[1:]}},
        constants,
    )


def frequencies_of(half):
    ends = {"start": 0, "limit": 512, "delta": 1}
    return {
        "frequencies": (100.0 ** (-np.arange(half) / half)).astype(np.float32)[None],
        "axis": np.array([1], np.int64),
        **{name: np.array(value, np.float32) for name, value in ends.items()},
    }


def computed_tables(factor):
    nodes = [
        helper.make_node("Range", ["start", "limit", "delta"], ["positions"]),
        helper.make_node("Unsqueeze", ["positions", "axis"], ["column"]),
        helper.make_node("Mul", ["column", "frequencies"], ["angle"]),
    ]
    for op_type, name in (("Cos", "cos"), ("Sin", "sin")):
        if factor == 1:
            nodes.append(helper.make_node(op_type, ["angle"], [name]))
        else:
            nodes.append(helper.make_node(op_type, ["angle"], [f"{name}/plain"]))
            nodes.append(helper.make_node("Mul", [f"{name}/plain", "factor"], [name]))
    return nodes


def integers(rng, batch, length, width):
    x = rng.integers(-100, 101, (batch, length, width)).astype(np.float32)
    x[..., ::32] = 127
    return x


def attend(run, x, cache, lengths):
    """One call; ``lengths`` after it. The cache is what came out."""
    feeds = {"x": x, **cache, "seqlens_k": np.array(lengths, np.int32) - 1}
    feeds["total_sequence_length"] = np.array(max(lengths), np.int32)
    y, key, value = run.run(["y", "present.0.key", "present.0.value"], feeds)
    return y, {"past.0.key": key, "past.0.value": value}


def tables_of(positions, half):
    angles = np.arange(positions)[:, None] * 100.0 ** (-np.arange(half) / half)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


ATTENTIONS = {
    "a head of keys each": dict(heads=4, kv_heads=4, dim=16, scale=0.001),
    "three a head of keys": dict(heads=9, kv_heads=3, dim=32, scale=0.0005),
    "one head of keys": dict(heads=5, kv_heads=1, dim=24, scale=0.001),
    "a window": dict(heads=2, kv_heads=2, dim=16, scale=0.001, local_window_size=7),
    "capped": dict(heads=2, kv_heads=1, dim=16, scale=0.001, softcap=2.0),
    "turned in halves": dict(heads=4, kv_heads=2, dim=16, scale=0.001, rotary=1),
    "turned in pairs": dict(heads=4, kv_heads=2, dim=16, scale=0.001, rotary=2),
    "turned by frequencies": dict(heads=4, kv_heads=2, dim=16, scale=0.001, rotary=1, factor=1),
    "turned in pairs by frequencies": dict(heads=4, kv_heads=2, dim=16, scale=0.001, rotary=2, factor=1.25),
    "codes, a scale a channel": dict(heads=4, kv_heads=2, dim=16, scale=0.001, codes="PER_CHANNEL"),
    "codes, one scale": dict(heads=6, kv_heads=2, dim=16, scale=0.001, codes="PER_TENSOR", rotary=1),
}


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_that_of_onnxruntime(name, halves, monkeypatch):
    if not halves:  # as they would be if float32 were kept
        monkeypatch.setattr(stages, "_keep_in_halves", lambda graph, attentions: None)
    options = dict(ATTENTIONS[name])
    if "rotary" in options and "factor" not in options:
        options["tables"] = tables_of(512, options["dim"] // 2)
    model = attention_model(**options)
    width = (options["heads"] + 2 * options["kv_heads"]) * options["dim"]
    proto = fused(model, {"u": width})
    assert [node.op_type for node in proto.graph.node] == ["Fused"]
    theirs, ours = session(model), session(proto)
    rng = np.random.default_rng(11)
    codes = "codes" in options
    # Integers are float16 numbers, turned ones are rounded; a code at the border may be its neighbour.
    tolerance = 0.2 if codes else 1.0 if halves and "rotary" in options else 2e-3

    def empty(batch, capacity, kind):
        shape = (batch, options["kv_heads"], capacity, options["dim"])
        return {name: np.zeros(shape, kind) for name in ("past.0.key", "past.0.value")}

    def compare(batch, capacity, calls):
        kinds = (np.int8, np.int8) if codes else (np.float32, np.float16 if halves else np.float32)
        caches = [empty(batch, capacity, kind) for kind in kinds]
        for length, lengths in calls:
            x = integers(rng, batch, length, width)
            expected, caches[0] = attend(theirs, x, caches[0], lengths)
            actual, caches[1] = attend(ours, x, caches[1], lengths)
            for row, count in enumerate(lengths):
                valid = min(length, count) if length > 1 and batch > 1 else length
                np.testing.assert_allclose(actual[row, :valid], expected[row, :valid], atol=tolerance)
                kept = caches[0]["past.0.key"][row, :, :count].astype(np.float32)
                found = caches[1]["past.0.key"][row, :, :count].astype(np.float32)
                np.testing.assert_allclose(found, kept, atol=1.01 if codes else 0.1)

    compare(1, 400, [(5, [5]), (1, [6]), (3, [9]), (300, [309]), (1, [310]), (2, [312])])
    compare(3, 160, [(9, [9, 4, 1]), (1, [10, 5, 2]), (1, [11, 6, 3])])
    compare(2, 0, [(1, [1, 1])])


@pytest.mark.parametrize("window", [-1, 100])
def test_a_token_sees_the_same_of_a_long_past_alone_and_in_a_chunk(window, instructions):
    options = dict(heads=6, kv_heads=2, dim=16, scale=0.001, rotary=1, tables=tables_of(1200, 8))
    run = session(fused(attention_model(**options, local_window_size=window), {"u": 160}))
    rng = np.random.default_rng(5)
    cache = {n: np.zeros((1, 2, 1200, 16), np.float16) for n in ("past.0.key", "past.0.value")}
    _, cache = attend(run, integers(rng, 1, 1020, 160), cache, [1020])
    x = integers(rng, 1, 9, 160)  # keys are shared out in other parts from the fifth of these on
    together, _ = attend(run, x, cache, [1029])
    for i in range(9):
        alone, cache = attend(run, x[:, i : i + 1], cache, [1021 + i])
        np.testing.assert_array_equal(alone[0, 0], together[0, i])


def test_lengths_that_do_not_fit_are_an_error_and_no_crash():
    options = dict(heads=2, kv_heads=1, dim=16, scale=0.1, rotary=1, tables=tables_of(16, 8))
    run = session(fused(attention_model(**options), {"u": 64}))
    x = integers(np.random.default_rng(0), 1, 1, 64)
    cache = {name: np.zeros((1, 1, 32, 16), np.float16) for name in ("past.0.key", "past.0.value")}
    attend(run, x, cache, [16])
    for seqlens, total in (([40], 8), ([-7], 8), ([16], 17), ([30], 31), ([3, 3], 4)):
        feeds = {"x": x, **cache, "seqlens_k": np.array(seqlens, np.int32)}
        feeds["total_sequence_length"] = np.array(total, np.int32)
        with pytest.raises(Exception, match="Fused"):
            run.run(None, feeds)


@pytest.mark.parametrize(
    "name, place, value",
    [
        ("attentions", 5, 9),  # more frequencies than there are
        ("attentions", 5, 2**20),
        ("attentions", 5, -1),
        ("attentions", 5, 0),  # then there would have to be a table of sines
        ("attentions", 8, -1),
        ("attentions", 8, 99),
        ("factors", 2, None),
    ],
)
def test_an_attention_whose_frequencies_do_not_fit_is_refused(name, place, value):
    options = dict(heads=2, kv_heads=1, dim=16, scale=0.1, rotary=1, factor=1)
    proto = fused(attention_model(**options), {"u": 64})
    (attribute,) = [a for a in proto.graph.node[0].attribute if a.name == name]
    numbers = attribute.floats if value is None else attribute.ints
    if value is None:
        del numbers[place]
    else:
        numbers[place] = value
    with pytest.raises(Exception, match=r"Fused|constant|Invalid"):
        session(proto)


@pytest.mark.parametrize("zeros", [False, True])
def test_an_embedding_is_looked_up_with_the_scales_that_are_stored(zeros, instructions):
    rng = np.random.default_rng(3)
    table, _ = weights(rng, 64, 40, 8, 32, zeros, True, False)
    table = {f"table.{name}": array.reshape(40, -1) for name, array in table.items()}
    head, _ = weights(rng, 64, 16, 4, 32, True, False, False)
    inputs = ["table.codes", "ids", "wide", *(["table.zeros"] if zeros else [])]
    nodes = [
        helper.make_node("Cast", ["table.scales"], ["wide"], to=FLOAT),
        helper.make_node(
            "GatherBlockQuantized", inputs, ["x"], domain=CONTRIB, bits=8, block_size=32, quantize_axis=1
        ),
        *product(64, 16, 4, 32, head),
    ]
    model = model_of(nodes, {"ids": (TensorProto.INT64, ["b", "s"])}, {"y": ["b", "s", 16]}, table | head)
    proto = fused(model, {"x": 64})
    assert [node.op_type for node in proto.graph.node] == ["GatherBlockQuantized", "Cast", "Fused"]
    ids = rng.integers(0, 40, (2, 7))
    theirs, ours = (session(m).run(None, {"ids": ids})[0] for m in (model, proto))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.02 * np.abs(theirs).max())


def tied(rng, sizes, bits, half=True, k=64):
    """ids -> rows of a table in one or two parts -> x -> a product with each part, and what they hold."""
    constants, nodes, outputs, rows = {}, [], {}, []
    start = 0
    for i, (n, b) in enumerate(zip(sizes, bits, strict=True)):
        own, _ = weights(rng, k, n, b, 32, False, half, False)
        constants |= {f"{i}.{name}": array for name, array in own.items()}
        constants |= {f"{i}.data": own["codes"].reshape(n, -1)}
        scales = f"{i}.scales"
        if half:
            nodes.append(helper.make_node("Cast", [scales], [f"{i}.wide"], to=FLOAT))
            scales = f"{i}.wide"
        ids = "ids"
        if len(sizes) > 1:
            ends = {"start": start, "low": 0, "high": n - 1}
            constants |= {f"{i}.{name}": np.array(value, np.int64) for name, value in ends.items()}
            nodes.append(helper.make_node("Sub", ["ids", f"{i}.start"], [f"{i}.moved"]))
            nodes.append(helper.make_node("Clip", [f"{i}.moved", f"{i}.low", f"{i}.high"], [f"{i}.ids"]))
            ids = f"{i}.ids"
        rows.append("x" if len(sizes) == 1 else f"{i}.rows")
        options = {"bits": b, "block_size": 32, "quantize_axis": 1, "domain": CONTRIB}
        inputs = [f"{i}.data", ids, scales]
        nodes.append(helper.make_node("GatherBlockQuantized", inputs, [rows[-1]], **options))
        start += n
    if len(sizes) > 1:
        constants |= {"border": np.array(sizes[0], np.int64), "axis": np.array([-1], np.int64)}
        nodes.append(helper.make_node("Less", ["ids", "border"], ["below"]))
        nodes.append(helper.make_node("Unsqueeze", ["below", "axis"], ["column"]))
        nodes.append(helper.make_node("Where", ["column", *rows], ["x"]))
    for i, (n, b) in enumerate(zip(sizes, bits, strict=True)):
        names = {name: f"{i}.{name}" for name in ("codes", "scales")}
        inputs = ["x", names["codes"], f"{i}.wide" if half else names["scales"]]
        options = {"K": k, "N": n, "bits": b, "block_size": 32, "accuracy_level": 4, "domain": CONTRIB}
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], **options))
        outputs[f"y{i}"] = ["b", "s", n]
    return model_of(nodes, {"ids": (TensorProto.INT64, ["b", "s"])}, outputs, constants)


TIED = [((40,), (8,)), ((19,), (4,)), ((16, 30), (8, 4)), ((24, 9), (4, 4))]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("sizes, bits", TIED)
def test_a_tied_embedding_is_looked_up_where_it_is_packed(sizes, bits, half, instructions):
    rng = np.random.default_rng(23)
    model = tied(rng, sizes, bits, half)
    proto = fused(model, {"x": 64})
    assert [node.op_type for node in proto.graph.node] == ["Fused"]
    ids = np.stack([np.arange(sum(sizes)), rng.permutation(sum(sizes))])
    run = session(proto)
    theirs, ours = session(model).run(None, {"ids": ids}), run.run(None, {"ids": ids})
    for expected, actual in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=0.02 * np.abs(expected).max())
    outside = np.array([[-1, sum(sizes), -(2**62), 2**62, 0]])  # whoever feeds a graph checks; no crash
    rows = run.run(None, {"ids": outside})[0][0]
    assert not rows[:4].any() and rows[4].any()


def test_rows_are_those_of_the_table_to_the_last_bit(instructions):
    """Through products with unit vectors, whose sums nothing is rounded in."""
    rng = np.random.default_rng(29)
    table, dense = weights(rng, 32, 40, 8, 32, False, True, False)
    unit = {"unit.codes": np.full((32, 1, 32), 128, np.uint8), "unit.scales": np.ones((32, 1), np.float32)}
    unit["unit.codes"][np.arange(32), 0, np.arange(32)] = 129
    constants = table | unit | {"data": table["codes"].reshape(40, -1)}
    gather = {"bits": 8, "block_size": 32, "quantize_axis": 1, "domain": CONTRIB}
    nodes = [
        helper.make_node("Cast", ["scales"], ["wide"], to=FLOAT),
        helper.make_node("GatherBlockQuantized", ["data", "ids", "wide"], ["x"], **gather),
        helper.make_node(
            "MatMulNBits", ["x", "codes", "wide"], ["y"], K=32, N=40, bits=8, block_size=32, domain=CONTRIB
        ),
        helper.make_node("Add", ["x", "x"], ["twice"]),
        *product(32, 32, 8, 32, unit, "twice", "z", "unit."),
    ]
    ids = {"ids": (TensorProto.INT64, ["b", "s"])}
    proto = fused(
        model_of(nodes, ids, {"twice": ["b", "s", 32], "y": ["b", "s", 40], "z": ["b", "s", 32]}, constants),
        {"x": 32},
    )
    assert [node.op_type for node in proto.graph.node] == ["Fused"]
    (found,) = session(proto).run(["twice"], {"ids": np.arange(40)[None]})
    np.testing.assert_array_equal(found[0], 2 * dense.astype(np.float32))


def test_an_embedding_with_other_numbers_than_the_head_keeps_its_own():
    model = tied(np.random.default_rng(31), (40,), (8,))
    (data,) = [tensor for tensor in model.graph.initializer if tensor.name == "0.data"]
    data.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(data) ^ 1, "0.data"))
    assert "GatherBlockQuantized" in [node.op_type for node in fused(model, {"x": 64}).graph.node]


def test_a_table_outlives_the_session_that_packed_it():
    """Sessions of one process have their own tables, and nodes of one session share them."""
    model = tied(np.random.default_rng(37), (16, 30), (8, 4))
    proto, ids = fused(model, {"x": 64}), {"ids": np.arange(46)[None]}
    first, second = session(proto), session(proto)
    expected = first.run(None, ids)
    del first
    for got, wanted in zip(second.run(None, ids), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "name, place, value",
    [
        ("ids", 0, 99),
        ("ids", 0, -1),
        ("ids", None, None),  # nothing to look up by
        ("stages", 5, 9),  # weights that there are not
        ("stages", 1, 0),
        ("stages", 6, 3),  # no part begins with the first token
        ("stages", 13, -1),
        ("widths", 0, 32),
    ],
)
def test_a_lookup_that_does_not_fit_is_refused(name, place, value):
    proto = fused(tied(np.random.default_rng(2), (16, 30), (8, 4)), {"x": 64})
    (attribute,) = [a for a in proto.graph.node[0].attribute if a.name == name]
    assert list(attribute.ints)
    if place is None:
        del attribute.ints[:]
    else:
        assert attribute.ints[place] != value
        attribute.ints[place] = value
    with pytest.raises(Exception, match=r"Fused|Invalid"):
        session(proto).run(None, {"ids": np.zeros((1, 1), np.int64)})


def side_by_side(rng, widths, k=96):
    """x -> a product for each width -> Concat -> y, and what the products hold."""
    nodes, constants = [], {}
    for i, width in enumerate(widths):
        own, _ = weights(rng, k, width, 4 + 4 * (i % 2), 32, True, False, i == 1)
        own = {f"{i}.{name}": array for name, array in own.items()}
        nodes += product(k, width, 4 + 4 * (i % 2), 32, own, y=f"y{i}", prefix=f"{i}.")
        constants |= own
    nodes.append(helper.make_node("Concat", [f"y{i}" for i in range(len(widths))], ["y"], axis=2))
    return model_of(nodes, {"x": ["b", "s", k]}, {"y": ["b", "s", sum(widths)]}, constants)


@pytest.mark.parametrize("widths", [(24, 40), (13, 8, 70), (16,)])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products_whose_results_lie_side_by_side_write_them_there(widths, rows, instructions):
    rng = np.random.default_rng(17)
    model = side_by_side(rng, widths)
    proto = fused(model)
    assert [node.op_type for node in proto.graph.node] == ["Fused"]
    x = rng.standard_normal((1, rows, 96)).astype(np.float32)
    theirs, ours = (session(m).run(None, {"x": x})[0] for m in (model, proto))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.02 * np.abs(theirs).max())


def test_a_result_that_something_else_reads_is_not_written_elsewhere():
    model = side_by_side(np.random.default_rng(1), (8, 16))
    model.graph.output.append(helper.make_tensor_value_info("y0", FLOAT, ["b", "s", 8]))
    assert "Concat" in [node.op_type for node in fused(model).graph.node]


@pytest.mark.parametrize(
    "place, value",
    [(6, 8), (6, -1), (13, 0), (13, 16), (13, 40), (13, 2**31), (10, 0), (8, 1)],  # columns, values
)
def test_columns_that_do_not_follow_each_other_are_refused(place, value):
    proto = fused(side_by_side(np.random.default_rng(2), (24, 40)))
    (attribute,) = [a for a in proto.graph.node[0].attribute if a.name == "stages"]
    assert attribute.ints[place] != value
    attribute.ints[place] = value
    with pytest.raises(Exception, match="Fused"):
        session(proto)


def test_a_lookup_does_not_hide_that_columns_are_missing():
    proto = fused(tied(np.random.default_rng(2), (16, 30), (8, 4)), {"x": 64})
    attributes = {a.name: a.ints for a in proto.graph.node[0].attribute}
    stages, widths = list(attributes["stages"]), attributes["widths"]
    product, lookup, value = stages[14:21], stages[7:14], len(widths)
    assert product[0] == PRODUCT and lookup[0] == LOOKUP and product[3] == 1
    widths[1] += 8  # of the product's result, of which the last columns are written by nobody
    widths.append(64)
    attributes["stages"][:] = [*stages[:21], *lookup[:3], value, -1, lookup[5], 0, *stages[21:]]
    for a in proto.graph.node[0].attribute:
        if a.name == "epsilons":
            a.floats.append(0.0)
    with pytest.raises(Exception, match="Fused"):
        session(proto)


def test_a_value_of_which_columns_are_missing_is_refused():
    proto = fused(side_by_side(np.random.default_rng(2), (24, 40)))
    (attribute,) = [a for a in proto.graph.node[0].attribute if a.name == "widths"]
    attribute.ints[1] += 8
    with pytest.raises(Exception, match="Fused"):
        session(proto)


# ---- nodes that lie ----


@pytest.mark.parametrize(
    "name, change",
    [
        ("weights", lambda v: [*v[:5], v[5] + 8, *v[6:]]),  # more columns than there are codes
        ("weights", lambda v: [*v[:4], v[4] + 64, *v[5:]]),
        ("weights", lambda v: [*v[:6], 3, v[7]]),
        ("weights", lambda v: [*v[:7], 24]),
        ("weights", lambda v: [*v[:6], 8, 0]),  # 4-bit ones as if they had one scale a column
        ("weights", lambda v: [99, *v[1:]]),
        ("weights", lambda v: [0, *v[1:]]),  # an input that is no constant
        ("weights", lambda v: v[:-1]),
        ("stages", lambda v: [77, *v[1:]]),
        ("stages", lambda v: [*v[:3], 55, *v[4:]]),
        ("stages", lambda v: [*v[:1], -1, *v[2:]]),
        ("stages", lambda v: [*v[:5], 9, *v[6:]]),
        ("stages", lambda v: [9, *v[1:]]),  # an attention that there is not
        ("stages", lambda v: v[:-1]),
        ("stages", lambda v: [*v[:1], 1, *v[2:]]),  # reads what it writes
        ("stages", lambda v: [*v[:4], 1, *v[5:]]),  # writes it twice
        ("stages", lambda v: v * 2),
        ("widths", lambda v: [*v, 8]),  # a value that nobody writes
        ("widths", lambda v: [*v, 2**25]),
        ("outputs", lambda v: v * 2),  # more than the node has
        ("widths", lambda v: [v[0], v[1] + 1]),
        ("widths", lambda v: [0, v[1]]),
        ("widths", lambda v: [2**40, v[1]]),
        ("outputs", lambda v: [0]),
        ("outputs", lambda v: [12]),
        ("outputs", lambda v: []),
        ("attentions", lambda v: [1] * 13),
        ("lengths", lambda v: [5]),
    ],
)
def test_a_node_whose_attributes_do_not_fit_is_refused(name, change):
    constants, _ = weights(np.random.default_rng(0), 64, 16, 4, 32, True, True, False)
    model = model_of(
        product(64, 16, 4, 32, constants), {"x": ["b", "s", 64]}, {"y": ["b", "s", 16]}, constants
    )
    proto = fused(model)
    change_attribute(proto, name, change)
    with pytest.raises(Exception, match=r"Fused|constant|input|Invalid|buffer"):
        session(proto).run(None, {"x": np.zeros((1, 1, 64), np.float32)})


# ---- whole models ----


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma3",
        "gpt2",
        "bart",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2", "phi3", "bert")),
    ],
)
def test_models_keep_their_answers(name, make_checkpoint, tmp_path, instructions):
    checkpoint = make_checkpoint(name)
    run_recipe(checkpoint, load_recipe("int4"), None, progress=False)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    facts = exported.fused_verification
    assert facts and "refused" not in facts, facts
    assert 0 < facts["typical_difference"] <= facts["allowed"]
    assert exported.fused_graphs
    for key, file in exported.fused_graphs.items():
        plain, own = (
            onnx.load(tmp_path / f, load_external_data=False).graph for f in (exported.graphs[key], file)
        )
        assert not any(node.op_type == "MatMulNBits" for node in own.node)
        places = [{(e.key, e.value) for t in g.initializer for e in t.external_data} for g in (plain, own)]
        assert places[1] <= places[0]  # no weight is stored again
    if name == "llama":
        kinds = [node.op_type for node in own.node]
        assert kinds.count("Fused") == 2 and "GroupQueryAttention" not in kinds
        types = {i.name: i.type.tensor_type.elem_type for i in own.input}
        assert types["past.0.key"] == HALF


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_a_token_does_not_depend_on_what_it_is_computed_with(recipe, make_checkpoint, tmp_path, instructions):
    """Alone, in a chunk, in a prompt or in a batch: the same logits, to the last bit."""
    checkpoint = make_checkpoint("llama")
    run_recipe(checkpoint, load_recipe(recipe), None, progress=False)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    opened = open_graph(tmp_path / exported.fused_graphs["decoder"])
    layers = [LayerShape(**layer) for layer in exported.model["layers"]]
    ids = np.random.default_rng(0).integers(3, 90, (3, 40))

    def run(batch, calls):
        decoder = DecoderRun(opened, exported.form, layers, batch=batch, capacity=48)
        return [decoder(tokens, lengths) for tokens, lengths in calls]

    steps = np.stack(
        [np.concatenate(run(1, [(row[None, i : i + 1], [i + 1]) for i in range(40)]))[:, 0] for row in ids]
    )
    for size in (2, 3, 5, 8, 17, 40):
        chunks = [(ids[:1, i : i + size], [min(i + size, 40)]) for i in range(0, 40, size)]
        np.testing.assert_array_equal(np.concatenate(run(1, chunks), 1)[0], steps[0], err_msg=str(size))
    lengths = [30, 21, 2]
    ragged = run(
        3,
        [(ids[:, :30], lengths), (np.stack([ids[r, n : n + 1] for r, n in enumerate(lengths)]), [31, 22, 3])],
    )
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(ragged[0][row, :length], steps[row, :length])
        np.testing.assert_array_equal(ragged[1][row, 0], steps[row, length])


def test_graphs_that_are_too_far_from_torch_are_left_out(make_checkpoint, tmp_path, monkeypatch):
    checkpoint = make_checkpoint("llama")
    run_recipe(checkpoint, load_recipe("int4"), None, progress=False)
    monkeypatch.setattr(exporter, "FUSED_TOLERANCE", -1e9)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    assert "differ" in exported.fused_verification["refused"]
    assert not exported.fused_graphs and not list(tmp_path.glob("*.fused.onnx"))


def test_without_the_library_there_are_none(make_checkpoint, tmp_path, monkeypatch):
    checkpoint = make_checkpoint("llama")
    run_recipe(checkpoint, load_recipe("int4"), None, progress=False)
    monkeypatch.setattr(kernels, "available", lambda: False)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    assert exported.fused_verification is None and not list(tmp_path.glob("*.fused.onnx"))


def test_a_model_without_weights_in_blocks_has_none(make_checkpoint, tmp_path):
    exported = export_checkpoint(make_checkpoint("llama"), tmp_path, progress=False)
    assert exported.fused_verification is None and not exported.fused_graphs
