"""Graphs with fixed codes compute in integers what the codes say, and onnxruntime keeps them that way."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from gemini.compress.apply import run_recipe
from gemini.compress.modules import ChannelwiseConv, ChannelwiseLinear
from gemini.compress.ranges import Codes
from gemini.compress.recipe import Recipe
from gemini.compress.specs import MinMax, PerChannel, QuantizeInt8
from gemini.export.exporter import export_checkpoint
from gemini.export.graphs import Graph
from gemini.export.tracing import trace
from gemini.export.twins.conv import as_conv
from gemini.runtime.session import session_options


def rounded(x: torch.Tensor, codes: Codes) -> torch.Tensor:
    """``x`` as its codes stand for it."""
    return ((x / codes.scale).round() + codes.zero_point).clamp(0, 255).sub(codes.zero_point) * codes.scale


class RoundedLinear(nn.Module):
    """MatMulIntegerToFloat over QuantizeLinear, one step after another in float64."""

    def __init__(self, layer: ChannelwiseLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        x = x if layer.divisor is None else x * (1 / layer.divisor)
        weight = layer.qweight.double() * layer.scales.double()[:, None]
        product = rounded(x, layer.input_codes).double() @ weight.T
        return (product + layer.bias.double()).float()


class RoundedConv(nn.Module):
    """QLinearConv between QuantizeLinear and DequantizeLinear."""

    def __init__(self, layer: ChannelwiseConv) -> None:
        super().__init__()
        self.layer = layer

    weight = property(lambda self: torch.empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, last = self.layer.codes
        return rounded(self.layer.convolve(rounded(x, first), self.layer.dequantized()), last)


def static_vit(make_checkpoint):
    checkpoint = make_checkpoint("vit")
    generator = torch.Generator().manual_seed(3)
    windows = [{"pixel_values": torch.randn(4, 3, 32, 32, generator=generator)} for _ in range(3)]
    spec = QuantizeInt8(PerChannel(), MinMax(), smoothing=0.5)
    run_recipe(checkpoint, Recipe("test", (spec,)), windows, progress=False)
    return checkpoint, windows[0]["pixel_values"]


def test_the_graph_computes_in_integers_what_the_codes_say(make_checkpoint, tmp_path):
    checkpoint, pixels = static_vit(make_checkpoint)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    assert exported.form.attention == "multi-head", exported.refused
    assert exported.twins["StaticTwin"] == 12 and exported.twins["StaticConvTwin"] == 1

    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    path = tmp_path / "vision.onnx"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    # one product for q, k and v of both layers, and one rounding in front of each
    assert operators["MatMulIntegerToFloat"] == 8 and operators["QuantizeLinear"] == 9
    assert operators["QLinearConv"] == 1 and operators["Conv"] == operators["MatMul"] == 0

    model = checkpoint.model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ChannelwiseLinear):
                setattr(parent, name, RoundedLinear(child))
            elif isinstance(child, ChannelwiseConv):
                setattr(parent, name, RoundedConv(child))
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits.numpy()
    (found,) = session.run(None, {"pixel_values": pixels.numpy()})
    # Float32 in another order moves a few activations over the edge of a code; a wrong scale moves all.
    assert np.abs(found - expected).mean() < 5e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(2, 1, 1, 1), (1, 2, 2, 4), ((2, 1), (0, 1), 1, 1)]
)
def test_convolutions_of_every_shape_compute_what_the_codes_say(stride, padding, dilation, groups):
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 12, 3, stride, padding, dilation, groups)
    weight = plain.weight.detach()
    scales = weight.abs().amax((1, 2, 3)) / 127
    codes = Codes(0.03, 120), Codes(0.02, 131)
    qweight = (weight / scales[:, None, None, None]).round().to(torch.int8)
    layer = ChannelwiseConv(plain, qweight, scales, plain.bias.detach(), codes)
    pixels = torch.randn(2, 8, 11, 9)
    graph = Graph("conv", as_conv(layer).eval(), {"x": pixels}, ({0: Dim("batch")},), ["x"], ["y"])
    session = onnxruntime.InferenceSession(
        ir.to_proto(trace(graph)).SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": pixels.numpy()})
    expected = RoundedConv(layer)(pixels).numpy()
    assert found.shape == functional.conv2d(pixels, weight, None, stride, padding, dilation, groups).shape
    difference = np.abs(found - expected)
    # A code of difference where the rounded bias or a float32 sum lies at the edge of one.
    assert difference.max() < 1.01 * codes[1].scale and (difference > 1e-5).mean() < 0.01
