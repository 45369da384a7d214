"""Fused nodes of encoders: 8-bit products with a scale a column, gains, attention of all to all."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from fused_nodes import CONTRIB, FLOAT, change_attribute, fused, model_of, session
from onnx import TensorProto, helper

from gemini.compress.apply import run_recipe
from gemini.compress.recipe import load_recipe
from gemini.export.exporter import export_checkpoint
from gemini.export.stages import fuse_stages
from gemini.runtime import kernels

pytestmark = pytest.mark.skipif(
    not kernels.available(), reason="the kernels are not built or do not fit here"
)


@pytest.fixture
def rounded(instructions):
    """What the kernels make of activations."""
    return lambda x: in_codes(x, {"avx2": 127, "own": 255}[instructions])


def in_codes(x, levels):
    """Activations as the kernels round them: rows have 1 + ``levels`` codes from lowest to highest."""
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    scale = (high - low) / np.float32(levels)
    inverse = np.where(scale > 0, np.float32(1) / np.where(scale > 0, scale, 1), np.float32(0))
    zero = np.rint(-low * inverse)[:, None]
    codes = np.clip(np.rint(x * inverse[:, None]) + zero, 0, levels)
    return (codes - zero).astype(np.float64) * scale[:, None]


def weights(rng, k, n, sigma=32.0, bias=True):
    codes = np.clip(np.rint(rng.standard_normal((k, n)) * sigma), -127, 127).astype(np.int8)
    constants = {"codes": codes, "scales": rng.uniform(0.001, 0.002, n).astype(np.float32)}
    constants["points"] = np.zeros(n, np.int8)
    if bias:
        constants["bias"] = rng.standard_normal(n).astype(np.float32)
    return constants, codes.astype(np.float64) * constants["scales"]


def product(constants, x="x", y="y"):
    names = [x, "codes", "scales", "points", *(["bias"] if "bias" in constants else [])]
    return helper.make_node("DynamicQuantizeMatMul", names, [y], domain=CONTRIB)


def one_product(constants, k, n):
    return model_of([product(constants)], {"x": ["b", "s", k]}, {"y": ["b", "s", n]}, constants)


# ---- products ----


@pytest.mark.parametrize("k, n", [(4, 1), (33, 3), (50, 45), (96, 24), (200, 100), (576, 50)])
def test_products_are_those_of_rounded_rows(k, n, rounded):
    rng = np.random.default_rng(k + n)
    constants, matrix = weights(rng, k, n, bias=n % 2 == 0)
    proto = fused(one_product(constants, k, n))
    assert [node.op_type for node in proto.graph.node] == ["Fused"]
    run = session(proto)
    for batch, length in ((1, 1), (1, 2), (3, 1), (2, 8), (1, 19), (2, 150)):
        x = (rng.standard_normal((batch, length, k)) + rng.uniform(-2, 2)).astype(np.float32)
        (y,) = run.run(None, {"x": x})
        expected = rounded(x.reshape(-1, k)) @ matrix + constants.get("bias", 0)
        np.testing.assert_allclose(y.reshape(-1, n), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["all", "columns", "features", "alternating", "none"])
def test_weights_as_large_as_can_be_do_not_leave_16_bits(name, rounded):
    rng = np.random.default_rng(5)
    k, n = 96, 48
    constants, _ = weights(rng, k, n, sigma=20.0)
    codes = constants["codes"]
    if name == "all":
        codes[:] = 127
    elif name == "columns":
        codes[:, ::7], codes[:, 3::7] = 127, -128
    elif name == "features":
        codes[:11], codes[-3:] = -128, 127
    elif name == "alternating":
        codes[::2], codes[1::2] = 127, -128
    else:
        codes[:] = 0
    run = session(fused(one_product(constants, k, n)))
    matrix = codes.astype(np.float64) * constants["scales"]
    largest = np.concatenate([np.ones((3, k)), -np.ones((2, k)), np.where(np.arange(k) % 2, 1, -1)[None]])
    x = np.concatenate([largest, rng.standard_normal((5, k))]).astype(np.float32)
    (y,) = run.run(None, {"x": x[None]})
    np.testing.assert_allclose(y[0], rounded(x) @ matrix + constants["bias"], atol=1e-4, rtol=1e-5)


def test_zeros_and_nothing(instructions):
    constants, _ = weights(np.random.default_rng(0), 40, 16)
    run = session(fused(one_product(constants, 40, 16)))
    (y,) = run.run(None, {"x": np.zeros((1, 3, 40), np.float32)})
    np.testing.assert_array_equal(y[0], np.tile(constants["bias"], (3, 1)))
    assert run.run(None, {"x": np.zeros((2, 0, 40), np.float32)})[0].shape == (2, 0, 16)


def test_a_row_does_not_depend_on_the_others(instructions):
    """Alone, in a batch, across pieces that go through all stages together: the same to the last bit."""
    constants, _ = weights(np.random.default_rng(1), 64, 80)
    run = session(fused(one_product(constants, 64, 80)))
    x = np.random.default_rng(2).standard_normal((3, 130, 64)).astype(np.float32)
    (together,) = run.run(None, {"x": x})
    for row, token in ((0, 0), (0, 129), (1, 127), (2, 1)):
        (alone,) = run.run(None, {"x": x[row : row + 1, token : token + 1]})
        np.testing.assert_array_equal(alone[0, 0], together[row, token])


def test_codes_that_were_fixed_in_calibration_become_those_of_the_row(rounded):
    rng = np.random.default_rng(3)
    constants, matrix = weights(rng, 64, 40)
    constants |= {"scale": np.array(0.02, np.float32), "zero": np.array(128, np.uint8)}
    names = ["q", "codes", "scale", "scales", "zero", "points", "bias"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("MatMulIntegerToFloat", names, ["y"], domain=CONTRIB),
    ]
    model = model_of(nodes, {"x": ["b", "s", 64]}, {"y": ["b", "s", 40]}, constants)
    proto = fused(model)
    assert [node.op_type for node in proto.graph.node] == ["Fused"]
    x = (rng.standard_normal((2, 9, 64)) * 0.7).astype(np.float32)
    (y,) = session(proto).run(None, {"x": x})
    expected = rounded(x.reshape(-1, 64)) @ matrix + constants["bias"]
    np.testing.assert_allclose(y.reshape(-1, 40), expected, atol=2e-5, rtol=1e-5)
    (theirs,) = session(model).run(None, {"x": x})
    np.testing.assert_allclose(y, theirs, atol=0.1)


def test_zero_points_of_weights_are_left_to_onnxruntime():
    constants, _ = weights(np.random.default_rng(0), 64, 16)
    constants["points"][3] = 1
    assert fused(one_product(constants, 64, 16)) is None


def test_a_number_a_channel_and_codes_in_blocks_may_stand_together(rounded):
    """x * gain goes to a product with a scale a column, and to one with 4-bit blocks."""
    rng = np.random.default_rng(4)
    constants, matrix = weights(rng, 64, 24)
    blocks = rng.integers(0, 256, (24, 2, 16), dtype=np.uint8)
    constants |= {
        "gain": rng.uniform(0.5, 2, 64).astype(np.float32),
        "blocks": blocks,
        "block_scales": np.full((24, 2), 0.001, np.float32),
    }
    options = {"K": 64, "N": 24, "bits": 4, "block_size": 32, "accuracy_level": 4}
    nodes = [
        product(constants, "x", "t"),
        helper.make_node("Mul", ["gain", "x"], ["u"]),
        product(constants, "u", "y"),
        helper.make_node("MatMulNBits", ["u", "blocks", "block_scales"], ["z"], domain=CONTRIB, **options),
    ]
    outputs = {name: ["b", "s", 24] for name in "tyz"}
    model = model_of(nodes, {"x": ["b", "s", 64]}, outputs, constants)
    proto = fused(model, {"u": 64})
    assert [node.op_type for node in proto.graph.node] == ["Fused"]
    x = rng.standard_normal((1, 21, 64)).astype(np.float32)
    _, y, z = session(proto).run(["t", "y", "z"], {"x": x})
    expected = rounded(x[0] * constants["gain"]) @ matrix + constants["bias"]
    np.testing.assert_allclose(y[0], expected, atol=2e-5, rtol=1e-5)
    (theirs,) = session(model).run(["z"], {"x": x})
    np.testing.assert_allclose(z, theirs, atol=2e-3)


@pytest.mark.parametrize(
    "name, change",
    [
        ("weights", lambda v: [*v[:5], v[5] + 8, *v[6:]]),  # more columns than there are codes
        ("weights", lambda v: [*v[:4], v[4] + 4, *v[5:]]),
        ("weights", lambda v: [*v[:6], 4, 0]),
        ("weights", lambda v: [*v[:7], 32]),  # codes in blocks, which they are not
        ("weights", lambda v: [*v[:2], 2, *v[3:]]),  # zero points
        ("weights", lambda v: [0, *v[1:]]),
        ("stages", lambda v: [10, -1, -1, 1, -1, 0, 0]),  # looked up, for which they would lie otherwise
        ("ids", lambda v: [0]),
    ],
)
def test_a_node_whose_attributes_do_not_fit_is_refused(name, change):
    constants, _ = weights(np.random.default_rng(0), 64, 16)
    proto = fused(one_product(constants, 64, 16))
    change_attribute(proto, name, change)
    with pytest.raises(Exception, match=r"Fused|constant|input|Invalid|buffer"):
        session(proto).run(None, {"x": np.zeros((1, 1, 64), np.float32)})


# ---- attention, beside onnxruntime's own operator ----


def attention_model(heads, kv_heads, dim, mask=None, scale=None, **attributes):
    """x -> a product that changes little (its codes say 127 * 1) -> Split -> Attention."""
    widths = [heads * dim, kv_heads * dim, kv_heads * dim]
    width = sum(widths)
    constants = {
        "codes": np.diag(np.full(width, 127)).astype(np.int8),
        "scales": np.full(width, 1 / 127, np.float32),
        "points": np.zeros(width, np.int8),
        "sizes": np.array(widths),
    }
    options = {"q_num_heads": heads, "kv_num_heads": kv_heads, "is_causal": 0, **attributes}
    if scale:
        options["scale"] = scale
    inputs = ["q", "k", "v", *(["mask"] if mask else [])]
    nodes = [
        product(constants, "x", "u"),
        helper.make_node("Split", ["u", "sizes"], ["q", "k", "v"], axis=-1),
        helper.make_node("Attention", inputs, ["y"], **options),
    ]
    given = {"x": ["b", "s", width]} | ({"mask": (FLOAT, mask)} if mask else {})
    outputs = {"y": ["b", "s", heads * dim], "u": ["b", "s", width]}
    model = model_of(nodes, given, {"y": outputs["y"]}, constants)
    shapes = {"u": width, "q": widths[0], "k": widths[1], "v": widths[2]}
    return model, shapes, width


def attention_of_numpy(u, heads, kv_heads, dim, mask, scale):
    batch, length, _ = u.shape
    parts = np.split(u.astype(np.float64), np.cumsum([heads * dim, kv_heads * dim]), axis=-1)
    q, k, v = (p.reshape(batch, length, -1, dim).transpose(0, 2, 1, 3) for p in parts)
    k, v = (np.repeat(p, heads // kv_heads, axis=1) for p in (k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * (scale or dim**-0.5) + (0 if mask is None else mask)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return (shares @ v).transpose(0, 2, 1, 3).reshape(batch, length, -1)


MASKS = {
    "none": None,
    "one for all": [1, 1, "s", "s"],
    "a row of keys": ["b", 1, 1, "s"],
    "one a row": ["b", 1, "s", "s"],
    "one a head": [1, "h", "s", "s"],
}


@pytest.mark.parametrize(
    "heads, kv_heads, dim", [(4, 4, 16), (6, 2, 8), (3, 3, 40), (1, 1, 64), (4, 2, 32), (2, 2, 96)]
)
@pytest.mark.parametrize("name", MASKS)
def test_attention_to_all_is_that_of_the_formula(name, heads, kv_heads, dim, rounded):
    # With AVX-512 BF16 queries, keys, values and weights have 8 bits behind the point of their first one.
    pairs = kernels.state() == "AVX-512 VNNI and BF16" and dim % 32 == 0
    tolerance = {"atol": 0.02, "rtol": 0.01} if pairs else {"atol": 2e-5, "rtol": 1e-4}
    mask_dims, scale = MASKS[name], 0.3 if heads == 4 else None
    model, shapes, width = attention_model(heads, kv_heads, dim, mask_dims, scale)
    proto = fused(model, shapes)
    assert [node.op_type for node in proto.graph.node] == ["Fused"]
    ours = session(proto)
    rng = np.random.default_rng(dim)
    for batch, length in ((1, 1), (2, 7), (3, 40), (1, 150), (5, 60)):
        x = rng.standard_normal((batch, length, width)).astype(np.float32)
        feeds, mask = {"x": x}, None
        if mask_dims:
            sizes = {"b": batch, "s": length, "h": heads, 1: 1}
            mask = rng.standard_normal([sizes[d] for d in mask_dims]).astype(np.float32)
            mask[..., length // 2 + 1 :] = np.finfo(np.float32).min
            feeds["mask"] = mask
        (y,) = ours.run(None, feeds)
        u = rounded(x.reshape(-1, width)).reshape(x.shape)
        np.testing.assert_allclose(y, attention_of_numpy(u, heads, kv_heads, dim, mask, scale), **tolerance)


@pytest.mark.parametrize("length", [5, 16, 70])
@pytest.mark.parametrize("heads, dim", [(2, 32), (1, 64), (2, 24)])
def test_attention_that_needs_no_rounding_is_exact(length, heads, dim, instructions):
    """Integers that bfloat16 and 8 bits hold: every query finds the one key like it, whose value it gets."""
    model, shapes, width = attention_model(heads, heads, dim, scale=1.0)
    rng = np.random.default_rng(length)
    low, high = {"avx2": (-64, 63), "own": (-127, 128)}[instructions]  # so that a step between codes is 1
    batch, bits = 3, 7
    x = rng.integers(low, high + 1, (batch, length, 3, heads, dim)).astype(np.float32)
    signs = 60.0 * np.where(np.arange(length)[:, None] >> np.arange(bits) & 1, 1, -1)
    x[:, :, :2] = 0
    x[:, :, 1, :, :bits] = signs[:, None]
    wanted = np.stack([[rng.permutation(length) for _ in range(heads)] for _ in range(batch)])
    for b in range(batch):
        for h in range(heads):
            x[b, :, 0, h, :bits] = signs[wanted[b, h]]
    x[..., 2, :, 0], x[..., 2, :, 1] = low, high
    (y,) = session(fused(model, shapes)).run(None, {"x": x.reshape(batch, length, width)})
    y = y.reshape(batch, length, heads, dim)
    for b in range(batch):
        for h in range(heads):
            np.testing.assert_allclose(y[b, :, h], x[b, wanted[b, h], 2, h], rtol=1e-6, atol=1e-6)


def test_a_mask_of_another_shape_is_an_error_and_no_crash():
    model, shapes, width = attention_model(2, 2, 16, ["m", "h", "t", "u"])
    run = session(fused(model, shapes))
    for shape in ((3, 1, 5, 5), (2, 3, 5, 5), (2, 1, 4, 5), (2, 1, 5, 6), (2, 1, 5, 4)):
        with pytest.raises(Exception, match="a mask has another shape"):
            run.run(None, {"x": np.zeros((2, 5, width), np.float32), "mask": np.zeros(shape, np.float32)})


@pytest.mark.parametrize("options", [{"is_causal": 1}, {"softcap": 2.0}, {"dim": 12}])
def test_other_attention_is_left_to_onnxruntime(options):
    model, shapes, _ = attention_model(**{"heads": 2, "kv_heads": 2, "dim": 16, **options})
    assert [node.op_type for node in fused(model, shapes).graph.node] == ["Fused", "Split", "Attention"]


def test_parts_that_something_else_reads_are_left_alone():
    model, shapes, _ = attention_model(2, 2, 16)
    model.graph.output.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, ["b", "s", 32]))
    copy = fuse_stages(ir.from_proto(model), {n: ("b", "s", str(w)) for n, w in shapes.items()})
    assert [node.op_type for node in copy.graph] == ["Fused", "Split", "Attention"]


# ---- whole models ----


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "vit", "swin", "clip"])
def test_encoders_keep_their_answers(name, make_checkpoint, tmp_path, instructions):
    checkpoint = make_checkpoint(name)
    run_recipe(checkpoint, load_recipe("int8"), None, progress=False)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    facts = exported.fused_verification
    assert facts and "refused" not in facts, facts
    assert 0 < facts["typical_difference"] <= facts["allowed"]
    kinds = graph_kinds(tmp_path / one(exported.fused_graphs))
    assert "DynamicQuantizeMatMul" not in kinds
    if name in ("bert", "distilbert", "vit"):  # all layers are one node, the head after pooling another
        assert kinds.count("Fused") <= 2 and "Attention" not in kinds, kinds


def test_fixed_codes_keep_their_answers(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("vit")
    generator = torch.Generator().manual_seed(0)
    windows = [{"pixel_values": torch.rand(2, 3, 32, 32, generator=generator)} for _ in range(4)]
    run_recipe(checkpoint, load_recipe("int8-static"), windows, progress=False)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    assert "refused" not in exported.fused_verification, exported.fused_verification
    kinds = graph_kinds(tmp_path / one(exported.fused_graphs))
    assert "MatMulIntegerToFloat" not in kinds and "Attention" not in kinds


def one(files):
    (file,) = files.values()
    return file


def graph_kinds(path):
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
