"""Pruning whole experts: those that add least to what their layer puts out are left out.

made = prune_experts(model, windows, fraction=0.25)
made.model.save_pretrained(folder)

The router loses their rows and goes on with the others. Which tensors have an entry for each expert is not
listed: they are those that another number of experts in the configuration makes shorter, and with all experts
in another order the model must say what it did.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemini.compress.calibrate import Window, batches, run_over
from gemini.compress.experts import Experts, as_experts, is_stack
from gemini.compress.reshape import (
    Change,
    Fit,
    Shape,
    agrees,
    answer,
    cut_state,
    fields_of,
    fit_config,
    rebuild,
    require_known,
    shapes_of,
)
from gemini.errors import RecipeError
from gemini.model.hooks import hooked


@dataclass(frozen=True)
class ExpertReport:
    """Parameters before and after, configuration fields with their new values, and per stack what every
    expert adds (`expert_saliency`) and the experts that stay."""

    parameters_before: int
    parameters_after: int
    config: Mapping[str, Any]
    saliency: Mapping[str, tuple[float, ...]]
    kept: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Fewer:
    """A smaller model of the same class, and what became of it."""

    model: nn.Module
    report: ExpertReport


def expert_saliency(
    model: nn.Module, windows: Sequence[Window], *, progress: bool = True
) -> dict[str, tuple[Tensor, int]]:
    """How much each expert of each stack adds where it is chosen, and how many a token has: {stack: (float64
    (E,), k)}.

    S_e = mean of g_e(x) |f_e(x)| over the tokens x that the router sends it, with its weight g and what it
    makes of them f (Lasby et al., "REAP the Experts", arXiv:2510.13999, equation 9). 0 for one that no token
    reaches. RecipeError for a model without experts, or with some that ``Experts`` cannot be.
    """
    stacks = {name: module for name, module in model.named_modules() if is_stack(module)}
    if not stacks:
        raise RecipeError(f"{type(model).__name__} has no experts.", "Cut layers, heads or width.")
    found: dict[str, tuple[Tensor, int]] = {}

    def watch(name: str, experts: Experts) -> Any:
        totals = torch.zeros(2, experts.count, dtype=torch.float64)

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, chosen, weights = [*args, *kwargs.values()][:3]
            made, order = experts.each(hidden, chosen)
            added = made.double().norm(dim=1) * weights.reshape(-1)[order].double()
            picks = chosen.reshape(-1)[order]
            totals[0].index_add_(0, picks, added)
            totals[1].index_add_(0, picks, torch.ones_like(added))
            found[name] = totals[0] / totals[1].clamp_min(1), chosen.shape[-1]

        return hook

    with hooked(
        module.register_forward_pre_hook(watch(name, _known(module)), with_kwargs=True)
        for name, module in stacks.items()
    ):
        run_over(model, batches(windows), "experts", progress)
    if found.keys() != stacks.keys():
        raise RecipeError("There are experts that no calibration text reaches.", "Give other text.")
    return found


def _known(module: nn.Module) -> Experts:
    experts = as_experts(module)
    if experts is None:
        raise RecipeError(
            f"What {type(module).__name__} computes is not known.", "Cut layers, heads or width."
        )
    return experts


def prune_experts(
    model: nn.Module, windows: Sequence[Window], *, fraction: float, progress: bool = True
) -> Fewer:
    """Leave out the share ``fraction`` of the experts of every stack, rounded: those that add least.

    Args:
        model: a transformers model as its configuration builds it; it is left as it was.
        windows: calibration data; the first one also checks the result.

    Raises:
        RecipeError: no experts, fewer left than a token picks, or a configuration class that has no field for
            it.
        CheckpointError: the model is not what its configuration says.
    """
    if not 0 < fraction < 1:
        raise RecipeError(f"The share of experts to prune is {fraction}.", "Give one between 0 and 1.")
    require_known(model, windows)
    saliency = expert_saliency(model, windows, progress=progress)
    counts = {len(scores) for scores, _ in saliency.values()}
    if len(counts) > 1:
        raise RecipeError("Its layers have different numbers of experts.", "Cut layers, heads or width.")
    (before,) = counts
    after, picked = before - round(fraction * before), max(k for _, k in saliency.values())
    if after == before:
        raise RecipeError(f"{fraction} of {before} experts is none.", "Give a larger share.")
    if after < picked:
        raise RecipeError(
            f"{after} of {before} experts would stay, and a token picks {picked}.",
            "Give a smaller share.",
        )
    kept = {
        name: scores.argsort(descending=True, stable=True)[:after].sort().values
        for name, (scores, _) in saliency.items()
    }
    fit = _fit(model, windows[0], kept.keys(), before, after)
    made = rebuild(model, fit.config, _cut(model, fit, kept))
    answer(made, windows[0])
    report = ExpertReport(
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.numel() for parameter in made.parameters()),
        {".".join(path): value for path, value in fit.change.items()},
        {name: tuple(scores.tolist()) for name, (scores, _) in saliency.items()},
        {name: tuple(indices.tolist()) for name, indices in kept.items()},
    )
    return Fewer(made, report)


def _fit(model: nn.Module, window: Window, stacks: Collection[str], before: int, after: int) -> Fit:
    """The configuration with fewer experts that shortens what belongs to experts and nothing else."""
    shapes = shapes_of(model)
    own = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] in stacks}
    wanted: dict[str, Shape | None] = {name: (after, *shape[1:]) for name, shape in own.items()}

    def accept(name: str, old: Shape | None, new: Shape | None) -> bool:
        return _stack_of(name, stacks) is not None and _shortened(old, new) is not None

    candidates: list[Change] = [
        {path: after} for path, value in fields_of(model.config) if type(value) is int and value == before
    ]
    reasons: list[str] = []
    expected = answer(model, window)
    turned = torch.randperm(before, generator=torch.Generator().manual_seed(0))
    for fit in fit_config(model, candidates, accept, wanted, reasons):
        state = _cut(model, fit, dict.fromkeys(stacks, turned))
        if agrees(rebuild(model, model.config, state), window, expected):
            return fit
    against = f" ({'; '.join(reasons[:3])})" if reasons else ""
    raise RecipeError(
        f"{type(model.config).__name__} has no field that leaves {after} of {before} experts and the rest as "
        f"it is{against}.",
        "Give another share: experts may come in groups of one size.",
    )


def _cut(model: nn.Module, fit: Fit, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model, those with an entry for each expert with these experts' alone."""
    entries: dict[str, dict[int, Tensor]] = {}
    for name, shape in shapes_of(model).items():
        axis, stack = _shortened(shape, fit.shapes[name]), _stack_of(name, kept)
        if axis is not None and stack is not None:
            entries[name] = {axis: kept[stack]}
    return cut_state(model.state_dict(), entries)


def _shortened(old: Shape | None, new: Shape | None) -> int | None:
    """The one axis along which a shape differs; None if there is none, or more."""
    if old is None or new is None or len(old) != len(new):
        return None
    axes = [axis for axis, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
    return axes[0] if len(axes) == 1 else None


def _stack_of(name: str, stacks: Collection[str]) -> str | None:
    """The stack that a tensor belongs to or stands beside, in the module around it."""
    return next((stack for stack in stacks if name.startswith(stack.rpartition(".")[0] + ".")), None)
