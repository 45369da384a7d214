"""Calibration block by block: what the layers of each see once all blocks before it are changed.

    for block in stream(model, windows, names):
        block.hessians["model.layers.0.mlp.up_proj"]   # E[x x^T]
        ...                                            # cut or replace layers of the block

Most models are a few stacks of equal blocks. Each block runs alone on what the one before put out, so no more
is held than one batch's activations inside a block and the states between two blocks, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gemini.compress.calibrate import Window, as_feed, batches, each_input, hushed, idle_head, shortcut
from gemini.model.hooks import hooked

Rows: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Block:
    """One block of a stack and, for its layers, E[x x^T] of the inputs x that they will have with all blocks
    before changed: float64 (K, K). All names are those in the model."""

    name: str
    module: nn.Module
    hessians: dict[str, Tensor]


class Moment:
    """A running mean of ``x x^T`` over rows of activations, float64."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        # Products of one window in float32, sums over windows in float64.
        product = (rows.T @ rows).double()
        self.total = product if self.total is None else self.total.add_(product)
        self.count += len(rows)

    def mean(self) -> Tensor:
        assert self.total is not None
        return self.total / self.count


def find_stacks(model: nn.Module, names: Collection[str]) -> list[tuple[str, nn.ModuleList]]:
    """The outermost lists of two or more blocks of one class that hold any of the named layers, in order."""
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        blocks = list(module) if isinstance(module, nn.ModuleList) else []
        if len(blocks) < 2 or any(type(block) is not type(blocks[0]) for block in blocks):
            continue
        inside = any(path.startswith(f"{outer}.") for outer, _ in found)
        if not inside and any(name.startswith(f"{path}.") for name in names):
            found.append((path, module))
    return found


def stream(
    model: nn.Module,
    windows: Sequence[Window],
    names: Collection[str],
    *,
    progress: bool = True,
) -> Iterator[Block]:
    """Each block of each stack in the order of execution, ready to have its layers replaced.

    Between two blocks the changed one runs again, so that the next sees what it will really get. Named layers
    outside of the stacks are in no block, and a layer that no window reaches has no statistics. Layers of one
    block may be cut together; who replaces them one by one wants ``gemini.compress.sequential``.
    """
    windows = batches(windows)
    stacks = find_stacks(model, names)
    for path, stack in stacks:
        calls = record_calls(model, stack, windows)
        if any(len(each) != len(windows) for each in calls):
            continue  # a block that is not called once a window is no link of a chain
        states = [call.states for call in calls[0]]
        for index, block in enumerate(
            tqdm(stack, desc=f"calibrate {path}", unit="block", delay=2, leave=False, disable=not progress)
        ):
            prefix = f"{path}.{index}"
            own = {
                name: block.get_submodule(name.removeprefix(f"{prefix}."))
                for name in names
                if name.startswith(f"{prefix}.")
            }
            moments: dict[str, Moment] = {}
            leaders: dict[str, str] = {}
            for call, state in zip(calls[index], states, strict=True):
                seen, leaders = _inputs(block, call, state, own)
                for name, rows in seen.items():
                    moments.setdefault(name, Moment()).add(hushed(rows))
            found = {name: moment.mean() for name, moment in moments.items()}
            yield Block(prefix, block, {name: found[leader] for name, leader in leaders.items()})
            states = run_through(block, calls[index], states)


def second_moment(model: nn.Module, windows: Sequence[Window], name: str) -> Tensor | None:
    """E[x x^T] of the inputs of one layer, float64 (K, K), from whole runs of the model; None if none reaches
    it."""
    with watch_rows(model, name) as moment, idle_head(model):
        for window in batches(windows):
            with torch.no_grad():
                model(**as_feed(window), **shortcut(model, every_logit=True))
    return moment.mean() if moment.count else None


@contextmanager
def watch_rows(model: nn.Module, name: str) -> Iterator[Moment]:
    """Inside the block, every call of the named layer adds its inputs to the moment that is handed out."""
    layers, moment = {name: model.get_submodule(name)}, Moment()
    with each_input(layers, lambda _, x: moment.add(hushed(x.reshape(-1, x.shape[-1])))):
        yield moment


@dataclass(frozen=True)
class Call:
    """How a block was called: its states first, then what all calls need (masks, positions)."""

    states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None  # the name that states came under

    def run(self, block: nn.Module, states: Tensor) -> Tensor:
        """The block's own output for other states."""
        with torch.no_grad():
            named = {self.keyword: states} if self.keyword else {}
            first = () if self.keyword else (states,)
            made = block(*first, *self.args, **named, **self.kwargs)
        return made[0] if isinstance(made, tuple) else made


def run_through(block: nn.Module, calls: Sequence[Call], states: Sequence[Tensor]) -> list[Tensor]:
    """What a block makes of the states of every window."""
    return [call.run(block, state) for call, state in zip(calls, states, strict=True)]


def record_calls(model: nn.Module, stack: nn.ModuleList, windows: Iterable[Window]) -> list[list[Call]]:
    """Every call of every block, window by window; states are kept of the first block alone.

    Only the first block computes. The others put out what it did, as nobody looks at their states here, and
    what else a block is called with (masks, positions) comes from the model around them.
    """
    calls: list[list[Call]] = [[] for _ in stack]
    made: list[Any] = []

    def recorder(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keyword = None if args else next(iter(kwargs))
            states = kwargs[keyword] if keyword else args[0]
            others = {key: value for key, value in kwargs.items() if key != keyword}
            kept = states.detach().clone() if index == 0 else states[:0]
            calls[index].append(Call(kept, args[1:], others, keyword))

        return hook

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        made[:] = [output]

    hooks = (
        block.register_forward_pre_hook(recorder(index), with_kwargs=True)
        for index, block in enumerate(stack)
    )
    for block in list(stack)[1:]:
        block.forward = lambda *_args, **_kwargs: made[0]
    try:
        with hooked(hooks), stack[0].register_forward_hook(keep), torch.no_grad():
            for window in windows:
                model(**as_feed(window), **shortcut(model))
    finally:
        for block in list(stack)[1:]:
            del block.forward
    return calls


def _inputs(
    block: nn.Module, call: Call, states: Tensor, layers: dict[str, nn.Module]
) -> tuple[Rows, dict[str, str]]:
    """The inputs (rows, K) that the block's layers get for these states, and for each layer the first one
    with the same inputs, under whose name they are.

    Query, key and value read one tensor; its products are the most expensive part of calibration.
    """
    given: Rows = {}
    leaders: dict[str, str] = {}

    def take(name: str, x: Tensor) -> None:
        leaders[name] = next((other for other, seen in given.items() if seen is x), name)
        given.setdefault(leaders[name], x)

    with each_input(layers, take):
        call.run(block, states)
    rows = {name: x.detach().reshape(-1, x.shape[-1]) for name, x in given.items()}
    return rows, leaders
