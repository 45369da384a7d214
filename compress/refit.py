"""What stays of a model that was cut is fitted, in closed form, to put out what the whole model's states are.

    refit(smaller, model, windows, {"model.layers": (0, 1, 2, 4, 5)})

A block that lost something, or whose neighbour did, hands other states on than the whole model's. Some of the
difference is linear in what its last products read, and those products can make up for it: with the inputs z
of a product, the states s behind it and those t of the whole model at the same place, its weight W becomes

    W + D,   D = argmin sum |t - s - D z|^2 + lambda |D|^2 = sum (t - s) z^T (sum z z^T + lambda I)^-1

block by block, each on what the fitted blocks before put out: ridge regression (Hoerl and Kennard, 1970)
towards the weight that there is. Products that write to the states are found by running a block: whatever is
added to their output is added to the states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from gemini.compress.calibrate import Window, batches, each_input, hush
from gemini.compress.stream import Call, find_stacks, record_calls, run_through
from gemini.compress.structure import plain_linears, size_of
from gemini.compress.writers import find_writers, outputs_of, ridge_step, states_behind

DAMPINGS = (6.0, 2.0, 20.0, 60.0)  # tokens a feature; the first where no batch can be held out
_HELD_OUT = 5  # every so many batches one is there to choose among them
_EXACT = 1e-4  # of the size of states: less than that is rounding


@dataclass(frozen=True)
class Refitted:
    """A product and how far the states behind it are from the whole model's, before and after: the share
    E |t - s|^2 / E |t|^2 over the calibration windows."""

    name: str
    before: float
    after: float


def refit(
    smaller: nn.Module,
    whole: nn.Module,
    windows: Sequence[Window],
    kept: Mapping[str, Sequence[int]] | None = None,
    *,
    damping: float | None = None,
    progress: bool = True,
) -> tuple[Refitted, ...]:
    """Fit the products of ``smaller`` that write to its states, in place; returns what it came to.

    Args:
        smaller: what was cut from ``whole``: fewer blocks, narrower ones, or both; states are as wide.
        windows: calibration data, as ``stream`` takes them.
        kept: {stack: indices} of the blocks of ``whole`` that stayed; a stack that is not named kept all.
        damping: how much the weight that there is counts, in tokens for each feature of z: lambda is
            ``damping`` times the size of z times the mean of E[z^2]. Few tokens then change little. None:
            for each product that one of DAMPINGS which serves best on every fifth batch, held out from it.
            (SmolLM2-135M wants 6 where blocks are missing and 20 where they are narrower.)

    Stacks whose blocks are not called once a window, and products behind which states are normed before they
    leave the block, are left as they are.
    """
    windows = batches(windows)
    originals = dict(find_stacks(whole, plain_linears(whole)))
    found: list[Refitted] = []
    for path, stack in find_stacks(smaller, plain_linears(smaller)):
        original = originals[path]
        indices = list((kept or {}).get(path, range(len(original))))
        own, known = record_calls(smaller, stack, windows), record_calls(whole, original, windows)
        if any(len(each) != len(windows) for each in (*own, *known)):
            continue
        states, wanted = ([call.states for call in calls[0]] for calls in (own, known))
        at = 0  # the block of the whole model that reads ``wanted``
        bar = tqdm(stack, desc=f"refit {path}", unit="block", delay=2, leave=False, disable=not progress)
        for index, block in enumerate(bar):
            end = indices[index + 1] if index + 1 < len(stack) else len(original)
            while at < indices[index]:  # blocks before the first that stayed
                wanted = run_through(original[at], known[at], wanted)
                at += 1
            if end == at + 1 and _equal(states, wanted) and _same_weights(block, original[at]):
                mine = run_through(block, own[index], states)
                its = run_through(original[at], known[at], wanted)
                if _equal(mine, its):  # nothing was cut so far, here or in an encoder
                    states, wanted, at = mine, its, end
                    continue
            writers = find_writers(block, own[index][0], states[0])
            targets, wanted = states_behind(original[at], known[at], wanted, writers)
            for left_out in range(at + 1, end):
                wanted = run_through(original[left_out], known[left_out], wanted)
            at = end
            for place, name in enumerate(targets):
                target = wanted if place + 1 == len(writers) else targets[name]
                moved = _fit(block, own[index], states, writers[place:], target, damping)
                if moved:
                    found.append(Refitted(f"{path}.{index}.{name}", *moved))
            states = run_through(block, own[index], states)
    return tuple(found)


def _equal(states: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, states, others))


def _same_weights(block: nn.Module, other: nn.Module) -> bool:
    mine, its = block.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and _equal(list(mine.values()), list(its.values()))


def _fit(
    block: nn.Module,
    calls: Sequence[Call],
    states: Sequence[Tensor],
    writers: Sequence[str],
    targets: Sequence[Tensor],
    damping: float | None,
) -> tuple[float, float] | None:
    """Fit the first of the writers, in place, to the states wanted before the others write.

    Returns the share of energy that was missed before and is after, None if none was.
    """
    layer = block.get_submodule(writers[0])
    size = size_of(layer)
    seen, held = _Sums(size), _Sums(size)
    missed, energy = 0.0, 0.0
    read: list[Tensor] = []
    later = {name: block.get_submodule(name) for name in writers[1:]}
    for number, (call, state, target) in enumerate(zip(calls, states, targets, strict=True), 1):
        with each_input({"": layer}, lambda _, x: read.append(x)), outputs_of(later) as made:
            found = call.run(block, state) - sum(made.values())
        wanted = target.reshape(-1, target.shape[-1])
        quiet = hush(wanted)  # the loud first tokens must not decide alone
        rows = read.pop().reshape(-1, size[1]) * quiet
        rest = (wanted - found.reshape(wanted.shape)) * quiet
        (held if number % _HELD_OUT == 0 else seen).add(rest, rows)
        missed += float(rest.square().sum(dtype=torch.float64))
        energy += float((wanted * quiet).square().sum(dtype=torch.float64))
    if missed <= _EXACT**2 * energy:
        return None
    if damping is None:
        tried = {each: held.change(seen.step(each)) for each in DAMPINGS}
        damping = min(tried, key=lambda each: tried[each])
    seen.gram += held.gram
    seen.cross += held.cross
    seen.count += held.count
    solved = seen.step(damping)
    step = (solved.T if isinstance(layer, Conv1D) else solved).float()
    with torch.no_grad():
        weight: Any = layer.weight
        weight.add_(step)
    return missed / energy, (missed + seen.change(solved)) / energy


class _Sums:
    """Sums over rows of inputs z and of what is missed, r, of a product of ``size`` (N, K), in float64."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.gram = torch.zeros(size[1], size[1], dtype=torch.float64)  # z z^T
        self.cross = torch.zeros(size, dtype=torch.float64)  # r z^T
        self.count = 0

    def add(self, missed: Tensor, rows: Tensor) -> None:
        self.gram += (rows.T @ rows).double()
        self.cross += (missed.T @ rows).double()
        self.count += len(rows)

    def step(self, damping: float) -> Tensor:
        """D (N, K)."""
        return ridge_step(self.cross, self.gram, damping, self.count)

    def change(self, step: Tensor) -> float:
        """sum |r - D z|^2 - |r|^2 = <D z z^T, D> - 2 <D, r z^T>."""
        return float(((step @ self.gram - 2 * self.cross) * step).sum())
