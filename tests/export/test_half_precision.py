"""The same graphs in float16: what torch computes, over the same weights, and nothing that CUDA has not."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from gemini.compress.apply import run_recipe
from gemini.compress.dense import dense_weights
from gemini.compress.recipe import Recipe, load_recipe
from gemini.compress.specs import QuantizeCache
from gemini.errors import ExportError
from gemini.export import exporter
from gemini.export.exporter import export_checkpoint
from gemini.export.half_precision import HALF_ONLY, half_precision
from gemini.export.verify import DecoderRun, open_graph
from gemini.runtime.schema import LayerShape

# 11 bits a number over two layers; logits are of the order of 5.
TOLERANCE = 0.1
WEIGHTS = 1024  # bytes: larger constants lie in the data file


def graph_of(path):
    return onnx.load(path, load_external_data=False).graph


def stored(graph) -> set[tuple[int, int]]:
    """Where a graph's weights lie in the data file: (offset, length)."""
    found = set()
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            found.add((int(place["offset"]), int(place["length"])))
    return found


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4"])
def test_a_decoder_in_half_precision_matches_torch_over_the_same_weights(recipe, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("llama")
    run_recipe(checkpoint, load_recipe(recipe), None, progress=False)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False, gpu=True)
    assert exported.half_graphs == {"decoder": "decoder.half.onnx"}
    single, half = graph_of(tmp_path / "decoder.onnx"), graph_of(tmp_path / "decoder.half.onnx")
    assert stored(half) == stored(single) and stored(half)
    session = open_graph(tmp_path / "decoder.half.onnx")
    types = {node.name: node.type for node in (*session.get_inputs(), *session.get_outputs())}
    assert {types[name] for name in types if name.startswith(("past", "present"))} == {"tensor(float16)"}
    assert types["logits"] == "tensor(float)"
    layers = [LayerShape(**layer) for layer in exported.model["layers"]]
    ids = np.random.default_rng(0).integers(3, 100, (2, 9))
    run = DecoderRun(session, exported.form, layers, batch=2, capacity=16)
    logits = run(ids[:, :6], [6, 6])
    step = run(ids[:, 6:7], [7, 7])
    with torch.no_grad(), dense_weights(checkpoint.model):
        expected = checkpoint.model(torch.from_numpy(ids[:, :7])).logits.numpy()
    np.testing.assert_allclose(logits, expected[:, :6], atol=TOLERANCE)
    np.testing.assert_allclose(step[:, 0], expected[:, 6], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["bert", "vit", "bart"])
def test_other_families_have_graphs_in_half_precision(name, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(name)
    run_recipe(checkpoint, load_recipe("int8"), None, progress=False)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False, gpu=True)
    assert set(exported.half_graphs) == set(exported.graphs)
    # Products in integers have no kernel for CUDA; what stays are weights unpacked to float16.
    for graph in map(graph_of, map(tmp_path.joinpath, exported.half_graphs.values())):
        kinds = {node.op_type for node in graph.node}
        assert not kinds & {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearConv"}
    worst = max(case["difference"] for case in exported.half_verification["cases"])
    assert 0 < worst < TOLERANCE  # 0 would mean that nothing was rounded


def test_without_the_option_there_is_no_such_graph(make_checkpoint, tmp_path):
    exported = export_checkpoint(make_checkpoint("llama"), tmp_path, progress=False)
    assert not exported.half_graphs and not list(tmp_path.glob("*.half.onnx"))


def test_activations_over_the_range_leave_only_attention_in_float16(make_checkpoint, tmp_path):
    """A residual of 10^5 is infinite in float16, and the queries made of its norm are not."""
    checkpoint = make_checkpoint("llama")
    with torch.no_grad():
        checkpoint.model.model.embed_tokens.weight[:, 0] = 1e5
    exported = export_checkpoint(checkpoint, tmp_path, progress=False, gpu=True)
    graph = graph_of(tmp_path / "decoder.half.onnx")
    casts = [node for node in graph.node if node.op_type == "Cast"]
    attention = [node for node in graph.node if node.op_type in HALF_ONLY]
    made = {node.output[0]: node for node in casts}
    assert all(node.input[0] in made for node in attention)
    assert exported.half_verification["largest_difference"] < TOLERANCE


def test_a_model_that_is_wrong_in_half_precision_is_refused(make_checkpoint, tmp_path, monkeypatch):
    def broken(model, folder, only=()):
        copy = half_precision(model, folder, only)
        for node in list(copy.graph):
            if node.op_type == "Sigmoid":
                node.op_type = "Tanh"
        return copy

    monkeypatch.setattr(exporter, "half_precision", broken)
    with pytest.raises(ExportError, match="half precision") as caught:
        export_checkpoint(make_checkpoint("llama"), tmp_path, progress=False, gpu=True)
    assert "--gpu" in caught.value.remedy


def test_an_8_bit_cache_is_float16_on_a_gpu(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("llama")
    windows = [{"input_ids": torch.randint(3, 100, (4, 32)), "attention_mask": torch.ones(4, 32).long()}]
    run_recipe(checkpoint, Recipe("test", (QuantizeCache(),)), windows, progress=False)
    export_checkpoint(checkpoint, tmp_path, progress=False, gpu=True)
    types = {}
    for name in ("decoder", "decoder.half"):
        inputs = {port.name: port.type.tensor_type for port in graph_of(tmp_path / f"{name}.onnx").input}
        types[name] = inputs["past.0.key"].elem_type
    assert types == {"decoder": TensorProto.INT8, "decoder.half": TensorProto.FLOAT16}


def test_experts_that_cuda_cannot_multiply_are_refused(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("mixtral")  # an inner size of 96
    run_recipe(checkpoint, load_recipe("int4"), None, progress=False)
    with pytest.raises(ExportError, match="multiple of 64; it is 96"):
        export_checkpoint(checkpoint, tmp_path, progress=False, gpu=True)


def small(nodes, inputs, outputs, constants):
    graph = helper.make_graph(
        nodes,
        "small",
        inputs,
        outputs,
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def ran(model, feeds):
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def test_positions_stay_float32_until_they_meet_an_activation(tmp_path):
    """cos(position / 3) at 4097, which float16 rounds to 4096."""
    ports = [
        helper.make_tensor_value_info("positions", TensorProto.INT64, ["n"]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
    ]
    nodes = [
        helper.make_node("Cast", ["positions"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "rate"], ["angle"]),
        helper.make_node("Cos", ["angle"], ["cos"]),
        helper.make_node("Mul", ["x", "cos"], ["y"]),
    ]
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])]
    half = half_precision(small(nodes, ports, output, {"rate": np.array(1 / 3, np.float32)}), tmp_path)
    positions = np.array([4097, 2049, 5], np.int64)
    found = ran(half, {"positions": positions, "x": np.ones(3, np.float32)})
    np.testing.assert_allclose(found, np.cos(positions / 3), atol=2e-3)
    assert abs(np.cos(4097 / 3) - np.cos(4096 / 3)) > 0.1


def test_the_lowest_number_of_a_mask_stays_a_number(tmp_path):
    """-3.4e38 would be -inf in float16, and a row of nothing but that would be NaN after the softmax."""
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])]
    nodes = [
        helper.make_node("Add", ["x", "lowest"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["y"]),
    ]
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])]
    lowest = np.full(2, np.finfo(np.float32).min, np.float32)
    half = half_precision(small(nodes, ports, output, {"lowest": lowest}), tmp_path)
    np.testing.assert_allclose(ran(half, {"x": np.zeros((1, 2), np.float32)}), [[0.5, 0.5]], atol=1e-3)


def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path):
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])]
    weight = np.full((32, 32), 1e5, np.float32)
    assert weight.nbytes > WEIGHTS
    with pytest.raises(ExportError, match="float16 cannot hold"):
        half_precision(small(nodes, ports, output, {"w": weight}), tmp_path)


def test_a_graph_inside_a_node_is_refused(tmp_path):
    flag = [helper.make_tensor_value_info("flag", TensorProto.BOOL, [])]
    body = [
        helper.make_graph(
            [helper.make_node("Constant", [], ["a"], value_float=number)],
            "branch",
            [],
            [helper.make_tensor_value_info("a", TensorProto.FLOAT, [])],
        )
        for number in (1.0, 2.0)
    ]
    nodes = [helper.make_node("If", ["flag"], ["y"], then_branch=body[0], else_branch=body[1])]
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])]
    with pytest.raises(ExportError, match="graph of its own"):
        half_precision(small(nodes, flag, output, {}), tmp_path)
