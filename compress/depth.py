"""Pruning whole layers: the blocks of a stack that matter least are left out.

Least may mean that a block changes its states least (one run), or that the predictions change least without
it, tried block by block (as many runs as there are blocks, for each one left out).

made = prune_layers(model, windows, fraction=0.25)
made.model.save_pretrained(folder)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gemini.compress.calibrate import Window, as_feed, batches, run_over, shortcut
from gemini.compress.reshape import (
    Change,
    Fit,
    Shape,
    Shapes,
    agrees,
    answer,
    fields_of,
    fit_config,
    rebuild,
    require_known,
    shapes_of,
)
from gemini.compress.stream import find_stacks
from gemini.compress.structure import plain_linears
from gemini.errors import RecipeError
from gemini.model.hooks import hooked


@dataclass(frozen=True)
class DepthReport:
    """Parameters before and after, configuration fields with their new values, and per stack the influence of
    every block and the blocks that stay."""

    parameters_before: int
    parameters_after: int
    config: Mapping[str, Any]
    influence: Mapping[str, tuple[float, ...]]
    kept: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shallower:
    """A smaller model of the same class, and what became of it."""

    model: nn.Module
    report: DepthReport


def block_influence(
    model: nn.Module, windows: Sequence[Window], *, progress: bool = True
) -> dict[str, Tensor]:
    """How much each block of each stack turns its states: {stack: float64 (blocks,)}.

    BI_i = 1 - E[x_i . x_{i+1} / (|x_i| |x_{i+1}|)] over all positions, x_i the states that go in, x_{i+1}
    those that come out (Men et al., "ShortGPT", arXiv:2403.03853, equation 1). Only sums are kept. Blocks
    that no window reaches have NaN.
    """
    stacks = find_stacks(model, plain_linears(model))
    totals = {path: torch.zeros(len(stack), 2, dtype=torch.float64) for path, stack in stacks}

    def watch(total: Tensor) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
            before = (args[0] if args else next(iter(kwargs.values()))).double()
            after = (made[0] if isinstance(made, tuple) else made).double()
            cosine = torch.cosine_similarity(before, after, dim=-1)
            total.add_(torch.tensor([float((1 - cosine).sum()), cosine.numel()], dtype=torch.float64))

        return hook

    with hooked(
        block.register_forward_hook(watch(totals[path][index]), with_kwargs=True)
        for path, stack in stacks
        for index, block in enumerate(stack)
    ):
        run_over(model, batches(windows), "influence", progress)
    return {path: total[:, 0] / total[:, 1] for path, total in totals.items()}


def prune_layers(
    model: nn.Module,
    windows: Sequence[Window],
    *,
    fraction: float = 0.0,
    by: str = "influence",
    drop: Mapping[str, Sequence[int]] | None = None,
    progress: bool = True,
) -> Shallower:
    """Leave out whole blocks: of every stack the share that matters least, or those that are named.

    Blocks unlike the others stay (the first block of T5 makes the position biases of all).

    Args:
        model: a transformers model as its configuration builds it; it is left as it was.
        windows: calibration data; the first one also checks the result.
        fraction: share of the blocks of each stack to leave out, rounded; at least one stays.
        by: "influence" (``block_influence``) or "divergence" (``least_missed``): what decides which ones.
        drop: {stack: indices} instead, for a choice made elsewhere.

    Returns:
        The smaller model, whose outputs equal those of ``model`` with the blocks skipped, and the report.

    Raises:
        RecipeError: nothing to leave out, blocks that cannot be, or a configuration class that has no field
            for it.
        CheckpointError: the model is not what its configuration says.
    """
    require_known(model, windows)
    influence = block_influence(model, windows, progress=progress)
    stacks = dict(find_stacks(model, plain_linears(model)))
    if drop is not None:
        gone = _named(stacks, drop)
    else:
        counts = _counts(stacks, fraction)
        if by not in {"influence", "divergence"}:
            raise RecipeError(f"Layers cannot be chosen by {by!r}.", "Write influence or divergence.")
        gone = (
            _least(stacks, influence, counts)
            if by == "influence"
            else least_missed(model, windows, counts, progress=progress)
        )
    kept = {
        path: tuple(index for index in range(len(stack)) if index not in gone.get(path, ()))
        for path, stack in stacks.items()
    }
    renamed = _renamed(list(shapes_of(model)), kept)
    before = shapes_of(model)
    target = {new: before[old] for new, old in renamed.items()}
    cut = {path: indices for path, indices in kept.items() if len(indices) < len(stacks[path])}
    with skipping(model, {path: gone[path] for path in cut}):
        expected = answer(model, windows[0])
    state = {new: model.state_dict()[old].detach().clone() for new, old in renamed.items()}
    reasons: list[str] = []
    for fit in _fits(model, stacks, cut, target, reasons):
        made = rebuild(model, fit.config, state)
        if agrees(made, windows[0], expected):
            break
    else:
        sizes = ", ".join(
            f"{path} from {len(stacks[path])} to {len(keep)} blocks" for path, keep in cut.items()
        )
        against = f" ({'; '.join(reasons[:3])})" if reasons else ""
        raise RecipeError(
            f"{type(model.config).__name__} has no field that cuts {sizes} and leaves the rest as it "
            f"is{against}.",
            "Leave out as many blocks of every stack, or prune feed-forward width.",
        )
    report = DepthReport(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in made.parameters()),
        {".".join(path): value for path, value in fit.change.items()},
        {path: tuple(scores.tolist()) for path, scores in influence.items()},
        kept,
    )
    return Shallower(made, report)


def states_to_have(report: DepthReport) -> list[int] | None:
    """For each block that stays, the block of the whole model behind which states are what it should put out:
    the last before the next one that stays. None if there is not one stack alone."""
    if len(report.kept) != 1:
        return None
    ((path, kept),) = report.kept.items()
    return [following - 1 for following in (*kept[1:], len(report.influence[path]))]


@contextmanager
def skipping(model: nn.Module, drop: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside the block the named blocks {stack: indices} of a model hand their states on as they come.

    What else a block returns, as position biases, stays what it was.
    """

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> Any:
        states = args[0] if args else next(iter(kwargs.values()))
        return (states, *made[1:]) if isinstance(made, tuple) else states

    with hooked(
        model.get_submodule(f"{path}.{index}").register_forward_hook(hook, with_kwargs=True)
        for path, indices in drop.items()
        for index in indices
    ):
        yield


def least_missed(
    model: nn.Module, windows: Sequence[Window], counts: Mapping[str, int], *, progress: bool = True
) -> dict[str, tuple[int, ...]]:
    """``counts`` {stack: n} blocks to leave out, one after another, each time that which is missed least.

    Song et al., "SLEB", arXiv:2402.09025, algorithm 1; missed least is what moves the predictions least: by
    KL(p || q) from the whole model's p, without labels, or by squared error of the first output of a model
    without logits. A few windows do; every one runs once for every block left, for each block left out.
    """
    stacks = dict(find_stacks(model, plain_linears(model)))
    windows = batches(windows)
    whole = [answer(model, window) for window in windows]
    distance = _divergence if _has_logits(model, windows[0]) else _squared
    gone: dict[str, list[int]] = {path: [] for path in counts}
    total = sum(counts.values())
    for _ in tqdm(range(total), desc="layers", unit="layer", delay=2, leave=False, disable=not progress):
        scores: dict[tuple[str, int], float] = {}
        for path, count in counts.items():
            if len(gone[path]) == count:
                continue
            for index in range(len(stacks[path])):
                if index in gone[path] or index in _pinned(stacks[path]):
                    continue
                with skipping(model, {**gone, path: [*gone[path], index]}):
                    made = [answer(model, window) for window in windows]
                scores[path, index] = sum(map(distance, whole, made))
        if not scores:
            break
        path, index = min(scores, key=lambda each: scores[each])
        gone[path].append(index)
    return {path: tuple(sorted(indices)) for path, indices in gone.items()}


def _has_logits(model: nn.Module, window: Window) -> bool:
    with torch.no_grad():
        return getattr(model(**as_feed(window), **shortcut(model)), "logits", None) is not None


def _divergence(whole: Tensor, made: Tensor) -> float:
    p, q = (logits.float().flatten(0, -2).log_softmax(-1) for logits in (whole, made))
    return float(nn.functional.kl_div(q, p, reduction="sum", log_target=True))


def _squared(whole: Tensor, made: Tensor) -> float:
    return float((whole.float() - made.float()).square().sum())


def _counts(stacks: Mapping[str, nn.ModuleList], fraction: float) -> dict[str, int]:
    """Blocks to leave out of each stack."""
    if not 0 < fraction < 1:
        raise RecipeError(f"The fraction of layers to prune is {fraction}.", "Give one between 0 and 1.")
    if not stacks:
        raise RecipeError("The model has no stack of two or more equal blocks.", "Prune it in another way.")
    counts: dict[str, int] = {}
    for path, stack in stacks.items():
        free = len(stack) - max(1, len(_pinned(stack)))
        counts[path] = min(free, math.floor(fraction * len(stack) + 0.5))
    if not any(counts.values()):
        raise RecipeError(
            "No layer would be left out: the share is less than half of one, or no two layers are alike.",
            "Ask for more, or prune feed-forward width.",
        )
    return counts


def _least(
    stacks: Mapping[str, nn.ModuleList], influence: Mapping[str, Tensor], counts: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """The blocks with the least influence, of equals the later ones."""
    gone: dict[str, tuple[int, ...]] = {}
    for path, stack in stacks.items():
        free = [index for index in range(len(stack)) if index not in _pinned(stack)]
        if any(math.isnan(float(influence[path][index])) for index in free):
            raise RecipeError(f"No calibration window reaches {path}.", "Calibrate with data that uses it.")
        order = sorted(free, key=lambda index: (float(influence[path][index]), -index))
        gone[path] = tuple(sorted(order[: counts[path]]))
    return gone


def _named(
    stacks: Mapping[str, nn.ModuleList], drop: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    gone: dict[str, tuple[int, ...]] = {}
    for path, indices in drop.items():
        if path not in stacks:
            raise RecipeError(f"There is no stack {path!r}.", f"Name one of {', '.join(stacks)}.")
        blocks = len(stacks[path])
        wanted = tuple(sorted(set(indices)))
        if not wanted or wanted[0] < 0 or wanted[-1] >= blocks or len(wanted) == blocks:
            raise RecipeError(
                f"Blocks {list(indices)} of {path} cannot be left out.", f"It has {blocks}; one must stay."
            )
        pinned = sorted(_pinned(stacks[path]) & set(wanted))
        if pinned:
            raise RecipeError(
                f"Block {pinned[0]} of {path} has other tensors than the rest.", "Leave out others."
            )
        gone[path] = wanted
    return gone


def _pinned(stack: nn.ModuleList) -> set[int]:
    """Blocks that hold other tensors, or of other shapes, than most do.

    Of two kinds with as many blocks each that of the last one is the rule: the first block is the odd one.
    """
    shapes = [frozenset(shapes_of(block).items()) for block in stack]
    ((usual, _),) = Counter(reversed(shapes)).most_common(1)
    return {index for index, own in enumerate(shapes) if own != usual}


def _renamed(names: Sequence[str], kept: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """{name in the smaller model: name in the model}."""
    made: dict[str, str] = {}
    for name in names:
        for path, indices in kept.items():
            if name.startswith(f"{path}."):
                index, rest = name.removeprefix(f"{path}.").split(".", 1)
                if int(index) in indices:
                    made[f"{path}.{list(indices).index(int(index))}.{rest}"] = name
                break
        else:
            made[name] = name
    return made


def _fits(
    model: nn.Module,
    stacks: Mapping[str, nn.ModuleList],
    cut: Mapping[str, Sequence[int]],
    target: Shapes,
    reasons: list[str],
) -> Iterator[Fit]:
    def accept(name: str, _old: Shape | None, new: Shape | None) -> bool:
        return target.get(name) == new

    wanted = {name: target.get(name) for name in {**shapes_of(model), **target}}
    for candidates in _candidates(model, stacks, cut):
        yield from fit_config(model, candidates, accept, wanted, reasons)


def _candidates(
    model: nn.Module, stacks: Mapping[str, nn.ModuleList], cut: Mapping[str, Sequence[int]]
) -> Iterator[list[Change]]:
    """Fields that may count the blocks of each stack, with the lists that may have an entry a block.

    Lists of names, or that are called after layers, are shortened with the blocks; any other list of that
    length is so only where nothing else fits, because it may be one of something else.
    """
    fields = list(fields_of(model.config))
    for every in (False, True):
        candidates: list[Change] = []
        for (path, kept), (field, value) in product(cut.items(), fields):
            blocks = len(stacks[path])
            if isinstance(value, bool) or value != blocks:
                continue
            change: Change = {field: len(kept)}
            for other, entries in fields:
                if isinstance(entries, list | tuple) and len(entries) == blocks and other[:-1] == field[:-1]:
                    named = "layer" in other[-1] or all(isinstance(entry, str) for entry in entries)
                    if named or every:
                        change[other] = type(entries)(entries[index] for index in kept)
            candidates.append(change)
        yield candidates
