"""AWQ: make the weights that meet large inputs larger before they are rounded, and the inputs smaller.

    folded = fold_awq(model, windows, names, form)      # then quantize as usual

Rounding in blocks hurts the weights of features with large inputs most. Multiplying those weights by s and
dividing the inputs by s keeps the product and lets such a weight use more of its block's steps. The division
costs nothing where what makes the inputs can take it in: the gain of a norm, or the rows of the product that
a gate multiplies. Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978, equations 4, 5.

What makes the inputs of which layers is seen in a run of the model, and a run decides whether folding keeps
its output; no layout is assumed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gemini.compress.calibrate import Window, as_feed, collect_input_moments, each_input, run_over
from gemini.compress.layers import Integers, quantized
from gemini.compress.select import weight_of
from gemini.model.disk import kept
from gemini.model.hooks import hooked

STRENGTHS = tuple(step / 20 for step in range(20))  # of the paper's grid
TOLERANCE = 1e-4  # of the largest output: what a fold may change in float32
_TRIAL = 32  # tokens that decide whether a fold is exact
_FLOOR = 1e-4  # features smaller than this share of the mean are taken to be that large


@dataclass(frozen=True)
class Group:
    """Layers that read one tensor and what makes it; dividing there and multiplying here changes nothing.

    ``shift``: the gain of the producer is its weight plus this (1 for Gemma's norms).
    """

    producer: str
    consumers: tuple[str, ...]
    shift: float = 0.0


def fold_awq(
    model: nn.Module, windows: Sequence[Window], names: Collection[str], form: Integers, progress: bool = True
) -> dict[Group, float]:
    """Scale and fold every group of the named linears, in place of the modules; returns each one's strength.

    A group for which no strength above 0 is better is left as it was.
    """
    groups = find_groups(model, windows, names)
    sizes = collect_sizes(model, windows, {group.consumers[0] for group in groups}, progress)
    chosen: dict[Group, float] = {}
    for group in tqdm(groups, desc="scales", unit="group", delay=2, leave=False, disable=not progress):
        mean, square = sizes[group.consumers[0]]
        weights = [weight_of(model.get_submodule(name)) for name in group.consumers]
        strength = best_strength(weights, mean, square, form)
        if strength:
            _put(model, _folded(model, group, scales(mean, strength)))
            chosen[group] = strength
    return chosen


def fold_smoothing(
    model: nn.Module,
    windows: Sequence[Window],
    names: Collection[str],
    strength: float,
    progress: bool = True,
) -> list[Group]:
    """Even out what the named linears read: divide by s = E[x^2] ^ (strength / 2) in the norms that make it.

    For layers whose activations are rounded in blocks as well: a large feature spoils those beside it, and
    8-bit weights have precision to spare. Products are left alone as makers: they are rounded themselves.
    """
    groups = [
        group
        for group in find_groups(model, windows, names)
        if not isinstance(model.get_submodule(group.producer), nn.Linear)
    ]
    moments = collect_input_moments(model, windows, {group.consumers[0] for group in groups}, progress)
    for group in groups:
        _put(model, _folded(model, group, scales(moments[group.consumers[0]].sqrt(), strength)))
    return groups


def fold_divisors(
    model: nn.Module, windows: Sequence[Window], divisors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[Group]]:
    """Divide the inputs of linears by ``divisors`` where they are made, wherever that is exact.

    Norms take them in, and products, whose 8-bit rows have a scale each. Returns what is left to be divided
    at run time, and the groups that are not.
    """
    left, folded = dict(divisors), []
    for group in find_groups(model, windows, divisors):
        s = divisors[group.consumers[0]]
        if all(divisors[name] is s for name in group.consumers):
            _put(model, _folded(model, group, s))
            folded.append(group)
            for name in group.consumers:
                del left[name]
    return left, folded


def scales(mean: Tensor, strength: float) -> Tensor:
    """s = mean ^ strength, its largest and smallest value as far from 1: (K,) -> float32 (K,)."""
    size = mean.clamp_min(_FLOOR * float(mean.mean()) or 1.0) ** strength
    return (size / (size.max() * size.min()).sqrt()).float()


def best_strength(weights: Iterable[Tensor], mean: Tensor, square: Tensor, form: Integers) -> float:
    """The strength of STRENGTHS with the least error E[x^2] (Q(w s) / s - w)^2, over all weights (N, K)."""
    weights = list(weights)

    def error(strength: float) -> float:
        s = scales(mean, strength)
        importance = square / s.double().square()  # of the inputs once they are divided
        wrong = 0.0
        for weight in weights:
            made = quantized(weight * s, form, importance).dequantized() / s
            wrong += float(torch.mv((made - weight).square(), square.float()).sum(dtype=torch.float64))
        return wrong

    return min(STRENGTHS, key=error)


def collect_sizes(
    model: nn.Module, windows: Sequence[Window], names: Collection[str], progress: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """E|x| and E[x^2] of each input feature of the named layers: {name: (float64 (K,), float64 (K,))}."""
    totals: dict[str, tuple[Tensor, Tensor, int]] = {}

    def take(name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        found = rows.abs().sum(0), rows.square().sum(0), len(rows)
        a, b, count = totals.get(name, (0.0, 0.0, 0))
        totals[name] = found[0] + a, found[1] + b, found[2] + count

    layers = {name: model.get_submodule(name) for name in names}
    with each_input(layers, take):
        run_over(model, windows, "sizes", progress)
    return {name: (first / count, second / count) for name, (first, second, count) in totals.items()}


def find_groups(model: nn.Module, windows: Sequence[Window], names: Collection[str]) -> list[Group]:
    """Every group among the named linears for which a trial shows that folding is exact."""
    window = _shortened(windows[0])
    expected = _outputs(model, window)
    generator = torch.Generator().manual_seed(0)
    groups = []
    for consumers, producers in _candidates(model, window, names):
        width = weight_of(model.get_submodule(consumers[0])).shape[1]
        s = torch.rand(width, generator=generator) + 0.5
        trials = (Group(name, consumers, shift) for name in producers for shift in (0.0, 1.0))
        found = next((group for group in trials if _is_exact(model, group, s, window, expected)), None)
        if found is not None:
            groups.append(found)
    return groups


def _candidates(
    model: nn.Module, window: Window, names: Collection[str]
) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """(layers that read one tensor, modules that may be what makes it), from one run.

    The maker of the very tensor, or else the linears before it with as many outputs, the last one first.
    """
    tensors: list[Tensor] = []  # kept, so that no other gets the same id
    made: dict[int, str] = {}
    readers: dict[int, list[str]] = {}
    linears: list[str] = []
    before: dict[int, list[str]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if name in names and isinstance(x, Tensor) and isinstance(module, nn.Linear):
                tensors.append(x)
                readers.setdefault(id(x), []).append(name)
                before.setdefault(id(x), list(linears))
            if isinstance(output, Tensor) and _gain(module) is not None:
                tensors.append(output)
                made[id(output)] = name
                if name in names:
                    linears.append(name)

        return hook

    with hooked(
        module.register_forward_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name in names or not list(module.children())
    ):
        _outputs(model, window)
    for key, consumers in readers.items():
        width = weight_of(model.get_submodule(consumers[0])).shape[1]
        makers = [made[key]] if key in made else list(reversed(before[key]))[:3]
        fitting = [
            name
            for name in makers
            if name not in consumers and len(model.get_parameter(f"{name}.weight")) == width
        ]
        if fitting:
            yield tuple(consumers), fitting


def _gain(module: nn.Module) -> Tensor | None:
    """The weight whose rows (or entries) scale the features that a module puts out."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) or (isinstance(weight, nn.Parameter) and weight.dim() == 1):
        return weight
    return None


def _is_exact(model: nn.Module, group: Group, s: Tensor, window: Window, expected: Tensor) -> bool:
    before = _put(model, _folded(model, group, s))
    try:
        found = _outputs(model, window)
    finally:
        _put(model, before)
    return torch.allclose(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@torch.no_grad()
def _folded(model: nn.Module, group: Group, s: Tensor) -> dict[str, nn.Module]:
    """Copies of the group's modules with s divided out of the producer and multiplied into the consumers."""
    producer = copy.deepcopy(model.get_submodule(group.producer))
    weight = _gain(producer)
    assert weight is not None
    rows = s if weight.dim() == 1 else s.unsqueeze(1)
    weight.copy_((weight + group.shift) / rows - group.shift)
    bias = getattr(producer, "bias", None)
    if isinstance(bias, Tensor):
        bias.div_(s)
    new = {group.producer: producer}
    for name in group.consumers:
        old = model.get_submodule(name).get_parameter("weight")
        weight = nn.Parameter(kept(old * s), requires_grad=False)
        new[name] = copy.deepcopy(model.get_submodule(name), {id(old): weight})
    return new


def _put(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Put modules under their names; returns what was there."""
    old = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, module)
    return old


def _outputs(model: nn.Module, window: Window) -> Tensor:
    with torch.no_grad():
        answer = model(**as_feed(window))
    return answer[0]


def _shortened(window: Window) -> Window:
    return window if isinstance(window, dict) else np.asarray(window)[:, :_TRIAL]
