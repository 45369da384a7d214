"""The packed buffers mean to onnxruntime what they mean to torch: one-node graphs against ``forward``."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from gemini.compress.layers import Bnb4, Channels, Integers, make_linear, make_table
from gemini.runtime.session import session_options


def run_node(op: str, inputs: dict, weights: list, attributes: dict, output_rank: int) -> np.ndarray:
    """Run one com.microsoft node; ``weights`` are the remaining inputs in order, None for an absent one."""
    names = [f"w{i}" if value is not None else "" for i, value in enumerate(weights)]
    while names and not names[-1]:
        names.pop()
    order = list(inputs)
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    feeds = [helper.make_tensor_value_info(n, types[v.dtype], v.shape) for n, v in inputs.items()]
    ordered = [*order, *names] if op != "GatherBlockQuantized" else [names[0], *order, *names[1:]]
    node = helper.make_node(op, ordered, ["y"], domain="com.microsoft", **attributes)
    constants = [
        numpy_helper.from_array(np.ascontiguousarray(value), f"w{i}")
        for i, value in enumerate(weights)
        if value is not None
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * output_rank)
    graph = helper.make_graph([node], "one", feeds, [out], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = session_options(
        1
    )  # the runtime's: without them products of 8 bits saturate where VNNI is missing
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def make_case(rows: int, columns: int, tokens: int = 3):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    return weight, torch.randn(rows, generator=generator), torch.randn(tokens, columns, generator=generator)


def array(tensor):
    return None if tensor is None else tensor.numpy()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "size"), [(64, 16), (96, 32), (192, 64), (100, 32), (83, 32)])
def test_matmul_nbits_equals_quantized_linear(bits, symmetric, columns, size):
    weight, bias, x = make_case(24, columns)
    layer = make_linear(weight, bias, Integers(bits, size, symmetric, fit="moments"))
    got = run_node(
        "MatMulNBits",
        {"x": x.numpy()},
        [array(layer.qweight), array(layer.scales), array(layer.zero_points), None, array(layer.bias)],
        {"K": columns, "N": 24, "bits": bits, "block_size": size, "accuracy_level": 0},
        2,
    )
    # 1e-4: float32 sums of up to 192 products in another order.
    np.testing.assert_allclose(got, layer(x).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "size"), [(64, 16), (96, 32), (192, 64), (40, 32)])
def test_gather_block_quantized_equals_quantized_embedding(bits, symmetric, columns, size):
    weight, _, _ = make_case(50, columns)
    table = make_table(weight, Integers(bits, size, symmetric), scale_by=None)
    ids = torch.tensor([[0, 49, 7], [7, 1, 30]])
    got = run_node(
        "GatherBlockQuantized",
        {"ids": ids.numpy()},
        [table.qweight.flatten(1).numpy(), array(table.scales), array(table.zero_points)],
        {"bits": bits, "block_size": size, "gather_axis": 0, "quantize_axis": 1},
        3,
    )
    # The operator returns the padded row. 1e-6: one subtraction and one product on both sides.
    np.testing.assert_allclose(got[..., :columns], table(ids).numpy(), rtol=1e-6, atol=1e-7)
    assert not got[..., columns:].any()


def test_dynamic_quantize_matmul_equals_channelwise_linear_up_to_activation_rounding():
    weight, bias, x = make_case(32, 80, tokens=16)
    layer = make_linear(weight, bias, Channels())
    got = run_node(
        "DynamicQuantizeMatMul",
        {"x": x.numpy()},
        [layer.qweight.T.numpy(), array(layer.scales), None, array(layer.bias)],
        {},
        2,
    )
    reference = layer(x).numpy()
    # x is rounded to 255 steps over its range of about 7: an error of 0.008 rms per feature, times |w| = 0.1
    # * 9.
    noise = float(x.max() - x.min()) / 255 / np.sqrt(12) * weight.square().sum(1).sqrt().numpy()
    assert np.abs(got - reference).max() < 5 * noise.max()
    assert np.abs((got - reference) / noise).mean() < 1.5


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (12, 96), (7, 51)])
def test_matmul_bnb4_equals_bnb4_linear(rows, columns):
    weight, _, x = make_case(rows, columns)
    layer = make_linear(weight, None, Bnb4(64))
    got = run_node(
        "MatMulBnb4",
        {"x": x.numpy()},
        [array(layer.qweight), array(layer.absmax)],
        {"K": columns, "N": rows, "block_size": 64, "quant_type": layer.quant_type},
        2,
    )
    # 1e-4: float32 sums of up to 96 products in another order.
    np.testing.assert_allclose(got, layer(x).numpy(), rtol=1e-4, atol=1e-4)
