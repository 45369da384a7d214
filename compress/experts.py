"""Experts: feed-forward layers side by side, of which a router picks a few for each token.

    open_experts(model)      # the model's own stacks become Experts, whose weights passes can see

transformers keeps the experts of a layer as three-dimensional parameters behind one interface. Here each of
their two products is one tall linear layer, expert under expert, so that whatever works on a weight (N, K)
works on all experts at once, with one statistic of their inputs: that of a single expert would rest on the
few tokens that a router sends it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemini.model.disk import kept

_TRIED = 4096  # pairs of numbers that a gate is tried on
_LARGE = 1e4
_SOLVED = 20  # rounds of a fixed point


@dataclass(frozen=True)
class Gate:
    """G * sigmoid(alpha G) * (L + beta) of a gate g and a linear part l, with G = min(g, limit) and L = l
    clipped to +-limit. SwiGLU (Shazeer, arXiv:2002.05202) has alpha 1, beta 0 and no limit. Source: the
    operator specification of MoE, domain com.microsoft."""

    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf

    def __call__(self, g: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - the specification's name
        g = g.clamp(max=self.limit)
        return g * torch.sigmoid(self.alpha * g) * (l.clamp(-self.limit, self.limit) + self.beta)


class StackedLinear(nn.Linear):
    """The same product of every expert: weight (E * N, K), bias (E * N,)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, experts: int) -> None:
        with torch.device("meta"):
            super().__init__(weight.shape[1], len(weight), bias=bias is not None)
        self.experts = experts
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows (S, K), the first ``counts[0]`` of which are for the first expert and so on, -> (S, N)."""
        return by_expert(self, rows, counts)


class PackedStack(nn.Module):
    """A stacked product whose tall weight another layer holds, packed or not."""

    def __init__(self, layer: nn.Module, experts: int) -> None:
        super().__init__()
        self.layer, self.experts = layer, experts

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """As `StackedLinear`."""
        return by_expert(self.layer, rows, counts)


def by_expert(layer: Any, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Each expert's product with its own rows, from a layer with a tall weight and perhaps a bias."""
    weights = layer.weight.unflatten(0, (len(counts), -1))
    biases = [None] * len(counts) if layer.bias is None else layer.bias.unflatten(0, (len(counts), -1))
    parts = zip(rows.split(list(counts)), weights, biases, strict=True)
    return torch.cat([functional.linear(part, weight, bias) for part, weight, bias in parts])


class Experts(nn.Module):
    """All experts of a layer: two stacked products with a gate between them.

    Rows of ``gate_up`` alternate between gate and linear part, as onnxruntime's operators want them.
    """

    def __init__(self, gate_up: StackedLinear, down: StackedLinear, gate: Gate) -> None:
        super().__init__()
        self.gate_up: Any = gate_up
        self.down: Any = down
        self.gate, self.count = gate, gate_up.experts

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Tokens (T, H), the experts chosen for each (T, k) int64 and their weights (T, k) -> (T, H)."""
        made, order = self.each(hidden, chosen)
        made = made * weights.reshape(-1, 1)[order].to(made.dtype)
        return torch.zeros_like(hidden).index_add(0, order // chosen.shape[-1], made.to(hidden.dtype))

    def each(self, hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """What every expert makes of every token that it was chosen for, (T * k, H), expert by expert, and
        which entry of ``chosen``, read row by row, each of these rows is for."""
        picks = chosen.reshape(-1)
        order = picks.argsort(stable=True)
        counts = picks.bincount(minlength=self.count).tolist()
        made = self.gate_up(hidden[order // chosen.shape[-1]], counts)
        return self.down(self.gate(made[:, ::2], made[:, 1::2]), counts), order


def open_experts(model: nn.Module) -> list[str]:
    """Replace the model's stacks of experts by `Experts`, in place; returns the names of those replaced.

    A stack that computes something else stays as it is.
    """
    found = []
    for name, module in list(model.named_modules()):
        made = as_experts(module)
        if made is not None and made is not module:
            model.set_submodule(name, made)
            found.append(name)
    return found


def pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of the two products of each `Experts` in the model: one operator holds both, in one format."""
    found = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    return [(f"{name}.gate_up", f"{name}.down") for name in found]


def is_stack(module: nn.Module) -> bool:
    """Whether the module holds experts behind transformers' interface for them."""
    known = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate", "down_proj")
    return all(hasattr(module, name) for name in known)


def as_experts(module: Any) -> Experts | None:
    """The same experts as `Experts`; None for any other module and for what `Gate` cannot compute."""
    if isinstance(module, Experts):
        return module
    if not is_stack(module) or not module.has_gate or getattr(module, "has_post_expert_norm", False):
        return None
    gate = find_gate(module._apply_gate, module.is_concatenated)
    if gate is None:
        return None
    products = []
    with torch.no_grad():
        for key in ("gate_up_proj", "down_proj"):
            weight = getattr(module, key)
            bias = getattr(module, f"{key}_bias") if module.has_bias else None
            weight = weight.transpose(1, 2) if module.is_transposed else weight
            if key == "gate_up_proj" and module.is_concatenated:
                weight, bias = _alternating(weight), None if bias is None else _alternating(bias)
            tall = kept(weight.detach().flatten(0, 1).contiguous())
            products.append(StackedLinear(tall, None if bias is None else bias.flatten(), len(weight)))
    gate_up, down = products
    return Experts(gate_up, down, gate).eval()


def find_gate(apply: Callable[[Tensor], Tensor], concatenated: bool) -> Gate | None:
    """The gate that a function of gate and linear part computes, found by trying it; None if it is no `Gate`.

    ``apply`` (S, 2 * N) -> (S, N), its parts one after the other or, unless ``concatenated``, alternating.
    """

    def tried(g: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - as above
        both = torch.stack((g, l), dim=-1)
        return apply(both.mT.flatten(-2) if concatenated else both.flatten(-2))

    with torch.no_grad():
        g, linear = torch.tensor([[[1.0, 1.0, _LARGE]], [[0.0, 1.0, 1.0]]], dtype=torch.float64)
        at_zero, at_one, at_large = tried(g, linear)[0].tolist()
        slope = at_one - at_zero  # sigmoid(alpha)
        if not 0.5 < slope < 1:
            return None
        alpha, beta = math.log(slope / (1 - slope)), at_zero / slope
        largest = at_large / (1 + beta) if beta != -1 else math.inf  # limit * sigmoid(alpha * limit)
        limit = largest
        for _ in range(_SOLVED):
            limit = largest * (1 + math.exp(-alpha * limit))
        gate = Gate(*(round(each, 6) for each in (alpha, beta, limit)))
        if gate.limit > _LARGE / 2:
            gate = Gate(gate.alpha, gate.beta)
        generator = torch.Generator().manual_seed(0)
        g, linear = 8 * torch.randn(2, 1, _TRIED, generator=generator, dtype=torch.float64)
        fits = torch.allclose(tried(g, linear), gate(g, linear), rtol=1e-4, atol=1e-4)
    return gate if fits else None


def _alternating(parts: Tensor) -> Tensor:
    """(E, 2 * N, ...), gates before linear parts, -> the same rows in turn."""
    return parts.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
