"""Structured pruning: fewer feed-forward units and attention heads, in a smaller checkpoint of one class.

    made = prune_units(model, windows, width=0.25)        # a quarter of the feed-forward units of every block
    made.model.save_pretrained(folder)

Which units there are is found by `gemini.compress.structure`, which matter least and how the others make up
for them by `gemini.compress.eliminate`, block by block on what the pruned blocks before put out, and which
configuration has the new shapes by `gemini.compress.reshape`. What cannot be done correctly is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gemini.compress.calibrate import Window
from gemini.compress.eliminate import correct, eliminate, unit_energy
from gemini.compress.gptq import DAMPING
from gemini.compress.reshape import (
    Change,
    Fit,
    Shape,
    Shapes,
    agrees,
    answer,
    cut_state,
    fields_of,
    fit_config,
    rebuild,
    require_equal,
    require_known,
    shapes_of,
)
from gemini.compress.select import Skipped, weight_of
from gemini.compress.stream import stream
from gemini.compress.structure import Coupling, Structure, find_couplings
from gemini.errors import RecipeError


@dataclass(frozen=True)
class Cut:
    """Units that a consumer kept, of how many, and the share of its output's energy that was lost.

    ``lost`` is tr((W - W') H (W - W')^T) / tr(W H W^T) over the calibration windows.
    """

    consumer: str
    kind: str  # "width" | "heads"
    units: int
    kept: tuple[int, ...]
    lost: float


@dataclass(frozen=True)
class PruneReport:
    """Parameters before and after, configuration fields with their new values, what was cut and what not."""

    parameters_before: int
    parameters_after: int
    config: Mapping[str, Any]
    cuts: tuple[Cut, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Pruned:
    """A smaller model of the same class, and what became of it."""

    model: nn.Module
    report: PruneReport


def kept_units(units: int, fraction: float, multiple: int) -> int:
    """How many of ``units`` stay when ``fraction`` goes: the nearest multiple, at least one of it.

    RecipeError for a fraction outside of [0, 1).
    """
    if not 0 <= fraction < 1:
        raise RecipeError(f"The fraction to prune is {fraction}.", "Give one from 0 to below 1.")
    kept = round((1 - fraction) * units / multiple) * multiple
    return min(units, max(multiple, kept))


def prune_units(
    model: nn.Module,
    windows: Sequence[Window],
    *,
    width: float = 0.0,
    heads: float = 0.0,
    multiple: int = 32,
    compensate: bool = True,
    damping: float = DAMPING,
    fisher: Mapping[str, Tensor] | None = None,
    structure: Structure | None = None,
    progress: bool = True,
) -> Pruned:
    """Cut a share of the feed-forward units and of the attention heads of every block.

    All blocks of all stacks keep as many, because a configuration has one number for them; which ones is each
    block's own choice, except where blocks share a table with an entry a head: then all keep the same.

    Args:
        model: a transformers model as its configuration builds it; it is left as it was.
        windows: calibration data, as ``stream`` takes them; the first one also checks the result.
        width: share of the feed-forward units to cut; what stays is a multiple of ``multiple``.
        heads: share of the attention heads to cut, in whole groups that share keys and values.
        compensate: the units that stay make up for the others by least squares, and units are chosen
            accordingly (``eliminate``); otherwise by their output energy alone (``unit_energy``).
        fisher: {consumer: (N,)} weights of its outputs, as ``sensitivity.output_fisher`` measures them.
        structure: what ``find_couplings`` found, if that is known already.

    Returns:
        The smaller model, whose outputs equal those of ``model`` with the consumers' weights changed and the
        columns of cut units zero, and the report.

    Raises:
        RecipeError: nothing to cut, a structure that cannot be cut, or a configuration class that has no
            field for the new size; the cause names the layers.
        CheckpointError: the model is not what its configuration says.
    """
    require_known(model, windows)
    found = structure or find_couplings(model, windows[0], progress=progress)
    counts = _plan(model, found, {"width": width, "heads": heads}, {"width": multiple, "heads": 1})
    chosen = [coupling for coupling in found.couplings if _site(coupling) in counts]
    fit, leftover = _fit(model, windows[0], chosen, counts)
    cuts: dict[str, Cut] = {}
    with _restored(model, [coupling.consumer for coupling in chosen]):
        together = _shares_entries(leftover, chosen)
        fixed = _common_choice(model, windows, chosen, counts, progress) if together else {}
        by_name = {coupling.consumer: coupling for coupling in chosen}
        for block in stream(model, windows, list(by_name), progress=progress):
            for name, hessian in block.hessians.items():
                cuts[name] = _cut(
                    model,
                    by_name[name],
                    hessian,
                    counts[_site(by_name[name])],
                    fixed.get(name),
                    compensate=compensate,
                    damping=damping,
                    fisher=None if fisher is None else fisher.get(name),
                )
        missing = [name for name in by_name if name not in cuts]
        if missing:
            raise RecipeError(
                f"No calibration window reaches {missing[0]}.", "Calibrate with data that uses every layer."
            )
        expected = answer(model, windows[0])
        kept = {name: torch.tensor(cut.kept) for name, cut in cuts.items()}
        made = _smaller(model, fit, leftover, chosen, kept)
    require_equal(made, windows[0], expected, "the model with the same units zero")
    named = {".".join(path): value for path, value in fit.change.items()}
    report = PruneReport(_parameters(model), _parameters(made), named, tuple(cuts.values()), found.refused)
    return Pruned(made, report)


def _site(coupling: Coupling) -> tuple[str, str]:
    return coupling.stack, coupling.site


def _plan(
    model: nn.Module, structure: Structure, fractions: Mapping[str, float], multiples: Mapping[str, int]
) -> dict[tuple[str, str], int]:
    """Units that stay at each site (stack, consumer inside of its block) where any go."""
    sites: dict[tuple[str, str], list[Coupling]] = {}
    for coupling in structure.couplings:
        sites.setdefault(_site(coupling), []).append(coupling)
    counts: dict[tuple[str, str], int] = {}
    for kind, fraction in fractions.items():
        kept_units(1, fraction, 1)  # complain about the fraction before anything else
        if not fraction:
            continue
        of_kind = {site: group for site, group in sites.items() if group[0].kind == kind}
        if not of_kind:
            first = {each.reason: each.name for each in reversed(structure.refused)}  # one of each reason
            reasons = "; ".join(f"{name}: {why}" if name else why for why, name in first.items())
            raise RecipeError(
                f"No {kind} of this model can be cut{f' ({reasons})' if reasons else ''}.",
                "Prune whole layers instead.",
            )
        for site, group in of_kind.items():
            units = group[0].units
            if len(group) < len(model.get_submodule(site[0])) or any(each.units != units for each in group):
                raise RecipeError(
                    f"{site[1]} has not the same units in all blocks of {site[0]}.",
                    "Prune whole layers instead.",
                )
            kept = kept_units(units, fraction, multiples[kind])
            if kept == units:
                continue
            counts[site] = kept
    if not counts:
        raise RecipeError(
            "Nothing would be cut: the share asked for is less than the smallest step.",
            "Ask for more, or for a smaller multiple.",
        )
    return counts


def _fit(
    model: nn.Module, window: Window, chosen: Sequence[Coupling], counts: Mapping[tuple[str, str], int]
) -> tuple[Fit, dict[str, _Entries]]:
    """The configuration for the sizes planned, and tensors with an entry a unit that it shortens besides.

    A run decides: with units drawn at random cut, the smaller model must say what the model says with them
    zero.
    """
    before, target = shapes_of(model), _target_shapes(model, chosen, counts)
    sizes = {(coupling.kind, coupling.units, counts[_site(coupling)]) for coupling in chosen}
    generator = torch.Generator().manual_seed(0)
    drawn: dict[tuple[int, int], Tensor] = {}
    for _, units, kept in sorted(sizes):
        drawn[units, kept] = torch.randperm(units, generator=generator)[:kept].sort().values
    trial = {c.consumer: drawn[c.units, counts[_site(c)]] for c in chosen}
    with _restored(model, list(trial)):
        for coupling in chosen:
            _zero(model, coupling, trial[coupling.consumer])
        expected = answer(model, window)

    wanted = {name: shape for name, shape in target.items() if shape != before[name]}

    def accept(name: str, old: Shape | None, new: Shape | None) -> bool:
        if name in wanted:
            return _toward(old, target[name], new)
        return _shortened(old, new, sizes) is not None

    reasons: list[str] = []
    for candidates in _candidates(model, sizes):
        for fit in fit_config(model, candidates, accept, wanted, reasons):
            entries = {
                name: _shortened(before[name], shape, sizes)
                for name, shape in fit.shapes.items()
                if shape not in (before[name], target[name])
            }
            leftover = {name: entry for name, entry in entries.items() if entry is not None}
            made = _smaller(model, fit, leftover, chosen, trial)
            if agrees(made, window, expected):
                return fit, leftover
    against = f" ({'; '.join(reasons[:3])})" if reasons else ""
    names = {c.site: f"{c.site} from {c.units} to {counts[_site(c)]} units" for c in chosen}
    raise RecipeError(
        f"{type(model.config).__name__} has no field that cuts {', '.join(names.values())} and leaves "
        f"the rest as it is{against}.",
        "Cut another share, or whole layers: some classes derive sizes from others, or bind them together.",
    )


def _candidates(model: nn.Module, sizes: Collection[tuple[str, int, int]]) -> Iterator[list[Change]]:
    """Fields whose value fits a size; then those without a value, which stand for a default."""
    numbers: list[Change] = []
    unset: list[Change] = []
    for path, value in fields_of(model.config):
        for kind, units, kept in sorted(sizes):
            if value is None:
                unset.append({path: kept})
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            # A group of heads that share a key counts as many times as it has queries.
            if value == units or (kind == "heads" and value and value % units == 0):
                numbers.append({path: value // units * kept})
    yield numbers
    yield unset


def _smaller(
    model: nn.Module,
    fit: Fit,
    leftover: Mapping[str, _Entries],
    chosen: Sequence[Coupling],
    kept: Mapping[str, Tensor],
) -> nn.Module:
    """The model with only the units kept, {consumer: units}."""
    keep = _kept_indices(model, chosen, kept)
    for name, entries in leftover.items():
        length = shapes_of(model)[name][entries.axis]
        keep[name] = {entries.axis: _entry_indices(name, length, entries, chosen, kept)}
    return rebuild(model, fit.config, cut_state(model.state_dict(), keep))


@dataclass(frozen=True)
class _Entries:
    """An axis with as many entries for each unit, as a table of biases a head has one."""

    axis: int
    units: int
    kept: int


def _shortened(
    old: Shape | None, new: Shape | None, sizes: Collection[tuple[str, int, int]]
) -> _Entries | None:
    if old is None or new is None or len(old) != len(new):
        return None
    axes = [axis for axis, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    for _, units, kept in sorted(sizes):
        if len(axes) == 1 and old[axes[0]] % units == 0 and new[axes[0]] * units == old[axes[0]] * kept:
            return _Entries(axes[0], units, kept)
    return None


def _toward(old: Shape | None, target: Shape, new: Shape | None) -> bool:
    if old is None or new is None or len(new) != len(target):
        return False
    return all(c in (a, b) for a, b, c in zip(old, target, new, strict=True))


def _axes(layer: nn.Module) -> tuple[int, int]:
    """Axes of outputs and of inputs in the stored weight."""
    return (1, 0) if isinstance(layer, Conv1D) else (0, 1)


def _target_shapes(
    model: nn.Module, chosen: Sequence[Coupling], counts: Mapping[tuple[str, str], int]
) -> Shapes:
    """Shapes of the state dict once every site has as many units as planned."""
    shapes = {name: list(shape) for name, shape in shapes_of(model).items()}
    for coupling in chosen:
        kept = counts[_site(coupling)]
        for name, table in coupling.producers.items():
            shapes[f"{name}.weight"][_axes(model.get_submodule(name))[0]] = kept * table.shape[1]
            if f"{name}.bias" in shapes:
                shapes[f"{name}.bias"][0] = kept * table.shape[1]
        axis = _axes(model.get_submodule(coupling.consumer))[1]
        shapes[f"{coupling.consumer}.weight"][axis] = kept * coupling.columns.shape[1]
    return {name: tuple(shape) for name, shape in shapes.items()}


def _kept_indices(
    model: nn.Module, chosen: Sequence[Coupling], units: Mapping[str, Tensor]
) -> dict[str, dict[int, Tensor]]:
    """For each tensor that gets smaller, the indices to keep along its axes, in their old order."""
    keep: dict[str, dict[int, Tensor]] = {}
    for coupling in chosen:
        kept = units[coupling.consumer]
        for name, table in coupling.producers.items():
            layer, rows = model.get_submodule(name), table[kept].flatten().sort().values
            keep.setdefault(f"{name}.weight", {})[_axes(layer)[0]] = rows
            if layer.bias is not None:
                keep[f"{name}.bias"] = {0: rows}
        axis = _axes(model.get_submodule(coupling.consumer))[1]
        columns = coupling.columns[kept].flatten().sort().values
        keep.setdefault(f"{coupling.consumer}.weight", {})[axis] = columns
    return keep


def _entry_indices(
    name: str, length: int, entries: _Entries, chosen: Sequence[Coupling], kept: Mapping[str, Tensor]
) -> Tensor:
    """Entries to keep of a tensor with some for each unit: its own block's units, else its stack's."""
    fitting = [c for c in chosen if (c.units, len(kept[c.consumer])) == (entries.units, entries.kept)]

    def distance(coupling: Coupling) -> int:
        if name.startswith(f"{coupling.stack}.{coupling.block}."):
            return 0
        return 1 if name.startswith(f"{coupling.stack}.") else 2

    units, each = kept[min(fitting, key=distance).consumer], length // entries.units
    return (units[:, None] * each + torch.arange(each)).flatten()


def _zero(model: nn.Module, coupling: Coupling, kept: Tensor) -> None:
    """Zero the consumer's columns of all but the kept units, in place."""
    gone = torch.ones(coupling.units, dtype=torch.bool).index_fill_(0, kept, False)
    layer = model.get_submodule(coupling.consumer)
    with torch.no_grad():
        layer.weight.index_fill_(_axes(layer)[1], coupling.columns[gone].flatten(), 0.0)


def _cut(
    model: nn.Module,
    coupling: Coupling,
    hessian: Tensor,
    count: int,
    fixed: Tensor | None,
    *,
    compensate: bool,
    damping: float,
    fisher: Tensor | None,
) -> Cut:
    """Choose the units of one consumer, and zero the others' columns in the model."""
    layer, units = model.get_submodule(coupling.consumer), coupling.columns
    weight = weight_of(layer).float().clone()
    if not bool(torch.isfinite(weight).all() and torch.isfinite(hessian).all()):
        raise RecipeError(
            f"{coupling.consumer} or what it reads holds values that are not finite.",
            "Prune a model that computes numbers.",
        )
    if fixed is None and compensate:
        taken = coupling.units - count
        kept, made = eliminate(weight, hessian, units, taken, damping=damping, fisher=fisher)
    else:
        energy = unit_energy(weight, hessian, units, fisher)
        kept = _highest(energy, count) if fixed is None else fixed
        made = correct(weight, hessian, units, kept, damping=damping) if compensate else weight
    with torch.no_grad():
        layer.weight.copy_(made.T if isinstance(layer, Conv1D) else made)
    _zero(model, coupling, kept)
    wrong = (weight - weight_of(layer)).double()
    whole = float(torch.einsum("ni,ij,nj->", weight.double(), hessian, weight.double()))
    lost = float(torch.einsum("ni,ij,nj->", wrong, hessian, wrong)) / whole if whole > 0 else 0.0
    return Cut(coupling.consumer, coupling.kind, coupling.units, tuple(kept.tolist()), lost)


def _highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the highest scores, ascending; of equals the earlier stay."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _shares_entries(leftover: Mapping[str, _Entries], chosen: Sequence[Coupling]) -> bool:
    """Whether some blocks have no entries a unit of their own, and so may use those of another."""
    blocks = [f"{coupling.stack}.{coupling.block}." for coupling in chosen if coupling.kind == "heads"]
    return bool(leftover) and not all(any(name.startswith(block) for name in leftover) for block in blocks)


def _common_choice(
    model: nn.Module,
    windows: Sequence[Window],
    chosen: Sequence[Coupling],
    counts: Mapping[tuple[str, str], int],
    progress: bool,
) -> dict[str, Tensor]:
    """Heads that all blocks of a stack keep together, {consumer: units}, by their shares of the energy.

    A table of biases a head in one block may serve all.
    """
    by_name = {coupling.consumer: coupling for coupling in chosen if coupling.kind == "heads"}
    totals: dict[str, Tensor] = {}
    for block in stream(model, windows, list(by_name), progress=progress):
        for name, hessian in block.hessians.items():
            coupling = by_name[name]
            weight = weight_of(model.get_submodule(name))
            energy = unit_energy(weight, hessian, coupling.columns)
            share = energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
            totals[coupling.stack] = totals[coupling.stack] + share if coupling.stack in totals else share
    return {
        name: _highest(totals[coupling.stack], counts[_site(coupling)])
        for name, coupling in by_name.items()
        if coupling.stack in totals
    }


@contextmanager
def _restored(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The weights of the named layers are afterwards what they were before."""
    kept = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                model.get_submodule(name).weight.copy_(weight)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
