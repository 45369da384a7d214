"""Tracing: operators without a rule are spelt otherwise, and nothing is decomposed or made twice for it."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

from gemini.export import tracing
from gemini.export.graphs import Graph


class Respelt(nn.Module):
    """What the converter has no rule for: ``1 - x``, a batch norm that does not learn, a constant, casts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        self.norm.running_var.copy_(torch.tensor([0.5, 4.0, 1.5]))
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x) * torch.tensor([2.0, 3.0, 5.0, 7.0])
        return torch.where((1.5 - y.float()).to(torch.int64) > 0, torch.rsub(y, 3), y)


@pytest.fixture
def graph() -> Graph:
    torch.manual_seed(0)
    return graph_of(Respelt().eval(), torch.randn(2, 3, 4, 4))


def graph_of(module: nn.Module, example: torch.Tensor) -> Graph:
    return Graph("any", module, {"x": example}, ({0: Dim("batch", min=1, max=64)},), ["x"], ["y"])


def test_no_operator_needs_decomposition(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    converted = tracing._converted
    monkeypatch.setattr(tracing, "_converted", lambda *given: calls.append(given) or converted(*given))
    model = tracing.trace(graph)
    assert len(calls) == 1
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for batch in (1, 3):
        x = torch.randn(batch, 3, 4, 4)
        (actual,) = session.run(None, {"x": x.numpy()})
        # float32, one multiplication and one addition in another order
        np.testing.assert_allclose(actual, graph.module(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_the_converters_rules_are_made_once_and_torch_is_left_as_it_was(graph: Graph) -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    before = ONNXRegistry.__dict__["from_torchlib"]
    tracing._rules.cache_clear()
    for _ in range(2):
        tracing.trace(graph)
    assert tracing._rules.cache_info().misses == 1
    assert tracing._rules.cache_info().hits == 1
    assert ONNXRegistry.__dict__["from_torchlib"] is before


def test_what_has_no_rule_at_all_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.xlog1py(1 - x, x) * torch.tensor([2.0, 3.0, 5.0])

    calls = []
    converted = tracing._converted
    monkeypatch.setattr(tracing, "_converted", lambda *given: calls.append(given) or converted(*given))
    model = tracing.trace(graph_of(Other(), torch.rand(2, 3)))
    assert len(calls) == 2
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    x = torch.rand(4, 3)
    (actual,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(actual, Other()(x).numpy(), rtol=1e-5)


class Overwritten(nn.Module):
    """Values that are changed in place; with ``view`` one of them is seen through a view of it as well."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.view = view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, _ = torch.topk(x.softmax(-1), 2)
        before = best * 3
        best /= best.sum(-1, keepdim=True)
        rows = best.view(-1) if self.view else before
        best += 1
        return torch.cat((best.flatten(), rows.flatten()))


@pytest.mark.parametrize("view", [False, True])
def test_values_changed_in_place_are_respelt_where_nothing_else_sees_them(view, monkeypatch) -> None:
    calls = []
    converted = tracing._converted
    monkeypatch.setattr(tracing, "_converted", lambda *given: calls.append(given) or converted(*given))
    model = tracing.trace(graph_of(Overwritten(view), torch.rand(2, 5)))
    assert len(calls) == 1 + view
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    x = torch.rand(3, 5)
    (actual,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(actual, Overwritten(view)(x).numpy(), rtol=1e-5)
