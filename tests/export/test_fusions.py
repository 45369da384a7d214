"""Each fusion: what it makes, that numbers stay, and one case that it must refuse."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from gemini.export.fusions import experts, factors, half_scales, layout, merge_projections, skip_norm
from gemini.export.fusions.patterns import new_initializer

F = onnx.TensorProto.FLOAT


def _model(text: str) -> ir.Model:
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n' + text)
    # The parser gives inner values no shape; the tracer does, and fusions rely on it.
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def _run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def _ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_opposite_transposes_vanish():
    model = _model(
        "g (float[a,b,4,2] x) => (float[a,b,4,2] y) "
        "{ t = Transpose<perm=[0,2,1,3]>(x) u = Transpose<perm=[0,2,1,3]>(t) y = Relu(u) }"
    )
    assert layout.drop_transpose_pairs(model.graph) == 1
    assert next(iter(model.graph)).op_type == "Transpose"  # now unread; the clean-up pass removes it
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 2)).astype(np.float32)
    np.testing.assert_array_equal(_run(model, {"x": x})[0], np.maximum(x, 0))


def test_transposes_that_do_not_cancel_stay():
    model = _model(
        "g (float[a,b,4,2] x) => (float[4,a,b,2] y) "
        "{ t = Transpose<perm=[0,2,1,3]>(x) y = Transpose<perm=[1,0,2,3]>(t) }"
    )
    assert layout.drop_transpose_pairs(model.graph) == 0


def test_reshape_by_known_symbols_becomes_constant():
    model = _model("g (float[a,b,8] x, int64[4] s) => (float[a,b,2,4] y) { y = Reshape(x, s) }")
    assert layout.fix_reshapes(model.graph) == 1
    (shape,) = (v for v in model.graph.initializers.values())
    assert shape.const_value.numpy().tolist() == [0, 0, 2, 4]


def test_reshape_with_two_free_dimensions_stays_dynamic():
    model = _model("g (float[a,b,8] x, int64[2] s) => (float[c,d] y) { y = Reshape(x, s) }")
    assert layout.fix_reshapes(model.graph) == 0


def _norm_model(addend: str = "float[a,b,8] r") -> ir.Model:
    model = _model(
        f"g (float[a,b,8] x, {addend}, float[8] w) => (float[a,b,8] y, float[a,b,8] z) "
        "{ s = Add(x, r) n = RMSNormalization<axis=-1, epsilon=0.00001>(s, w) y = Relu(n) z = Neg(s) }"
    )
    return model


def test_residual_addition_moves_into_the_norm_and_stays_readable():
    plain, fused = _norm_model(), _norm_model()
    assert skip_norm.fuse_skip_norm(fused.graph) == 1
    assert _ops(fused) == {"SkipSimplifiedLayerNormalization": 1, "Relu": 1, "Neg": 1}
    rng = np.random.default_rng(0)
    feeds = {
        n: rng.standard_normal(s).astype(np.float32)
        for n, s in (("x", (2, 3, 8)), ("r", (2, 3, 8)), ("w", (8,)))
    }
    for ours, theirs in zip(_run(fused, feeds), _run(plain, feeds), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)  # one float32 rounding in another order


def test_broadcast_addition_is_no_residual():
    model = _norm_model("float[8] r")
    assert skip_norm.fuse_skip_norm(model.graph) == 0


def _quantized(rng, n: int, k: int = 64, block: int = 32) -> dict[str, np.ndarray]:
    return {
        "w": rng.integers(0, 256, (n, k // block, block // 2), dtype=np.uint8),
        "s": rng.standard_normal((n, k // block)).astype(np.float32),
        "z": rng.integers(0, 256, (n, 1), dtype=np.uint8),
    }


def _attention(bits_of_value: int = 4) -> ir.Model:
    """x -> three quantized products -> Attention."""
    rng = np.random.default_rng(0)
    model = _model("g (float[1,3,64] x) => (float[1,3,16] y) { y = Relu(x) }")
    graph = model.graph
    relu = next(iter(graph))
    products = []
    for name, bits in (("query", 4), ("key", 4), ("value", bits_of_value)):
        arrays = _quantized(rng, 16)
        if bits == 8:
            arrays = {"w": rng.integers(0, 256, (16, 2, 32), dtype=np.uint8), "s": arrays["s"]}
        values = [new_initializer(graph, f"{name}.{key}", array) for key, array in arrays.items()]
        attributes = {"K": 64, "N": 16, "bits": bits, "block_size": 32, "accuracy_level": 1}
        node = ir.node("MatMulNBits", [graph.inputs[0], *values], attributes, domain="com.microsoft")
        graph.insert_before(relu, node)
        products.append(node.outputs[0])
    attention = ir.node("Attention", products, {"q_num_heads": 2, "kv_num_heads": 2})
    graph.insert_before(relu, attention)
    relu.replace_input_with(0, attention.outputs[0])
    return model


def test_query_key_and_value_become_one_product():
    plain, merged = _attention(), _attention()
    assert merge_projections.merge_qkv(merged.graph) == 1
    assert _ops(merged) == {"MatMulNBits": 1, "Split": 1, "Attention": 1, "Relu": 1}
    x = np.random.default_rng(1).standard_normal((1, 3, 64)).astype(np.float32)
    ours, theirs = _run(merged, {"x": x})[0], _run(plain, {"x": x})[0]
    # the same float32 products, perhaps in another order of threads
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_products_of_different_width_are_not_merged():
    model = _attention(bits_of_value=8)
    assert merge_projections.merge_qkv(model.graph) == 0


def test_name_that_exists_is_refused():
    graph = _norm_model().graph
    new_initializer(graph, "twice", np.ones(2, np.float32))
    with pytest.raises(AssertionError):
        new_initializer(graph, "twice", np.ones(2, np.float32))


def _scaled(second: str) -> ir.Model:
    return _model(
        "g (float[2,3] x) => (float[2,3] y, float[2,3] z) <float[3] c = {1, 2, 4}, float[3] d = {1, 2, 4}, "
        f"float[3] e = {{1, 2, 5}}> {{ a = Mul(x, c) b = {second} y = Relu(a) z = Neg(b) }}"
    )


def test_equal_factors_of_one_value_are_applied_once():
    model = _scaled("Mul(x, d)")
    assert factors.share_factors(model.graph) == 1
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    for ours, theirs in zip(_run(model, {"x": x}), _run(_scaled("Mul(x, d)"), {"x": x}), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # The second product is now unread; the clean-up pass removes it.
    assert sum(bool(node.outputs[0].uses()) for node in model.graph if node.op_type == "Mul") == 1


@pytest.mark.parametrize("second", ["Mul(x, e)", "Mul(a, d)"])
def test_other_factors_and_other_values_keep_their_own(second):
    assert factors.share_factors(_scaled(second).graph) == 0


def _blockwise(scales: np.ndarray) -> ir.Model:
    """Two products and a look-up over one table of 8 rows in 4-bit blocks of 16, as a tied head has them."""
    attributes = "K=32, N=8, bits=4, block_size=16, accuracy_level=4"
    model = _model(
        f"g (float[a,32] x, int64[a] ids, uint8[8,2,8] w, uint8[8,16] t) => (float[a,8] y, float[a,32] e) {{ "
        f"s = Constant<value = float[8,2] {{{', '.join(map(str, scales.ravel()))}}}>() "
        f"y = com.microsoft.MatMulNBits<{attributes}>(x, w, s) "
        "e = com.microsoft.GatherBlockQuantized<bits=4, block_size=16, gather_axis=0, quantize_axis=1>"
        "(t, ids, s) }"
    )
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def _blockwise_feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (8, 2, 8)).astype(np.uint8)
    x = rng.standard_normal((3, 32)).astype(np.float32)
    return {"x": x, "ids": np.array([5, 0]), "w": codes, "t": codes.reshape(8, 16)}


def test_scales_that_a_float16_holds_are_stored_as_one():
    scales = np.random.default_rng(1).uniform(0.01, 0.1, (8, 2)).astype(np.float16).astype(np.float32)
    model = _blockwise(scales)
    before = _run(model, _blockwise_feeds())
    assert half_scales.halve_scales(model.graph) == 1  # both nodes read the same ones
    model.graph.initializers.pop(next(v.name for v in model.graph.initializers.values() if not v.uses()))
    assert [v.dtype for v in model.graph.initializers.values()] == [ir.DataType.FLOAT16]
    assert _ops(model)["Cast"] == 1
    for old, new in zip(before, _run(model, _blockwise_feeds()), strict=True):
        np.testing.assert_array_equal(old, new)


def test_scales_that_a_float16_would_change_stay():
    model = _blockwise(np.full((8, 2), 0.1, np.float32))
    assert half_scales.halve_scales(model.graph) == 0 and _ops(model)["Cast"] == 0


def _experts_model(weigh: str, k: int = 2, back: str = "float[a,b,32] y") -> ir.Model:
    """Four experts of 32 x 16 in 8 bits behind a router; ``weigh`` makes ``shares`` of logits, and picks."""
    attributes = (
        f'k={k}, expert_weight_bits=8, block_size=16, activation_type="swiglu", swiglu_fusion=1, '
        "activation_alpha=1.0, activation_beta=0.0"
    )
    model = _model(
        f"g (float[a,b,32] x, float[4,32] w, int64[3] s) => ({back}) "
        "<int64[2] flat = {-1, 32}, int64[1] two = {2}, int64[1] last = {-1}, float zero = {0.0}> {"
        "h = Reshape(x, flat) logits = Gemm<transB=1>(h, w) "
        f"{weigh} "
        "every = Shape(logits) zeros = Expand(zero, every) "
        "routed = ScatterElements<axis=1>(zeros, picks, shares) "
        f"m = com.microsoft.QMoE<{attributes}>(h, routed, up, us, , down, ds, , , , , , , , routed) "
        "y = Reshape(m, s) }"
    )
    rng = np.random.default_rng(1)
    for name, shape in (("up", (4, 32, 32)), ("down", (4, 32, 16))):
        scales = rng.random((*shape[:2], shape[2] // 16), np.float32) * 0.01
        for key, array in ((name, rng.integers(0, 256, shape, np.uint8)), (f"{name[0]}s", scales)):
            made = new_initializer(model.graph, key, array)
            for node in model.graph:
                for place, value in enumerate(node.inputs):
                    if value is not None and value.name == key and value is not made:
                        node.replace_input_with(place, made)
    return model


_BY_SHARE = (
    "p = Softmax<axis=-1>(logits) best, picks = TopK<axis=-1>(p, two) "
    "total = ReduceSum<keepdims=1>(best, last) shares = Div(best, total)"
)
_OF_CHOSEN = "best, picks = TopK<axis=-1>(logits, two) shares = Softmax<axis=-1>(best)"


@pytest.mark.parametrize("weigh", [_BY_SHARE, _OF_CHOSEN])
def test_a_router_moves_into_its_operator_and_rows_stay_sequences(weigh):
    plain, fused = _experts_model(weigh), _experts_model(weigh)
    assert experts.fuse_router(fused.graph) == 1
    assert experts.keep_sequences(fused.graph) == 1
    ir.passes.common.RemoveUnusedNodesPass()(fused)
    assert _ops(fused) == {"Reshape": 1, "Gemm": 1, "QMoE": 1}
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 32), (4, 32)))
    feeds = {"x": x, "w": w, "s": np.array([2, 3, 32])}
    expected, found = _run(plain, feeds)[0], _run(fused, feeds)[0]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("weigh", "k"),
    [
        ("p = Softmax<axis=-1>(logits) shares, picks = TopK<axis=-1>(p, two)", 2),  # no sum of 1
        ("p = Sigmoid(logits) shares, picks = TopK<axis=-1>(p, two)", 2),
        ("best, picks = TopK<axis=-1, largest=0>(logits, two) shares = Softmax<axis=-1>(best)", 2),
        (_OF_CHOSEN, 3),
    ],
)
def test_a_router_of_another_kind_stays(weigh, k):
    model = _experts_model(weigh, k)
    assert experts.fuse_router(model.graph) == 0
    assert experts.keep_sequences(model.graph) == 0  # its weights have a row for each token


def test_rows_that_do_not_become_the_same_sequences_stay_rows():
    model = _experts_model(_BY_SHARE, back="float[b,a,32] y")
    assert experts.fuse_router(model.graph) == 1
    assert experts.keep_sequences(model.graph) == 0
