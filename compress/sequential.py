"""Calibration layer by layer: what each sees once those before it are quantized, and what it can make up for.

    for turn in sequential(model, windows, names):
        turn.layers, turn.hessian, turn.moves
        ...                                       # replace these layers

Layers of a block that read one tensor take a turn together, in the order in which they run, and the next turn
sees what they put out once they are replaced (``true_sequential`` in GPTQ's own code).

GPTQ makes up for what a weight loses inside of one layer. What the layers before have lost already is in the
states, and a layer that writes to these can take out as much of it as is linear in its inputs x: with the
states t of the model as it was behind this layer and those s of the one that is quantized so far, it is to
become, before it is quantized itself, W + D with

    D = argmin E |t - s - D x|^2 + lambda |D|^2

(SmolLM2-135M, 4 bits in blocks of 32, lambda as below: divergence 0.0744 -> 0.0667 nats on prose, 0.0546 ->
0.0446 on documentation.) Layers in front of a softmax, a gate or a product of two must not be moved that way:
least squares shrink what is noisy, and shrunk twice it drifts (0.0744 -> 1.13).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gemini.compress.calibrate import Window, batches, each_input, hush
from gemini.compress.dense import dense, dense_weights
from gemini.compress.experts import PackedStack
from gemini.compress.select import weight_of
from gemini.compress.stream import Call, Moment, find_stacks, record_calls, second_moment
from gemini.compress.writers import find_writers, outputs_of, ridge_step, states_behind

DAMPING = 20.0  # tokens a feature


@dataclass(frozen=True)
class Turn:
    """Layers that read one tensor x with all layers before them quantized.

    ``hessian`` is E[x x^T], float64 (K, K); ``moves`` {layer: float32 (N, K)} what to add to a weight before
    it is quantized. All names are those in the model.
    """

    layers: tuple[str, ...]
    hessian: Tensor
    moves: Mapping[str, Tensor] = field(default_factory=dict)


def sequential(
    model: nn.Module,
    windows: Sequence[Window],
    names: Collection[str],
    *,
    after: str | None = None,
    damping: float = DAMPING,
    progress: bool = True,
) -> Iterator[Turn]:
    """Each named layer of each stack of blocks in the order of execution, ready to be replaced.

    Named layers outside of the stacks take no turn, but the one that comes ``after`` them all, such as the
    head, does. Neither do layers that no window reaches.

    Args:
        windows: calibration data, as ``stream`` takes them.
        damping: how much the weight that there is counts against a move, in tokens for each feature of x:
            lambda is ``damping`` times the size of x times the mean of E[x^2], by the number of tokens.
    """
    windows = batches(windows)
    stacks = find_stacks(model, names)
    wholes = [record_calls(model, stack, windows) for _, stack in stacks]
    given: list[Tensor] = []  # what the last block of the last stack gets
    for (path, stack), whole in zip(stacks, wholes, strict=True):
        given = []
        own = whole if whole is wholes[0] else record_calls(model, stack, windows)
        if any(len(each) != len(windows) for each in own):
            continue  # a block that is not called once a window is no link of a chain
        states, wanted = ([call.states for call in calls[0]] for calls in (own, whole))
        writers = find_writers(stack[0], own[0][0], states[0])
        bar = tqdm(stack, desc=f"calibrate {path}", unit="block", delay=2, leave=False, disable=not progress)
        for index, block in enumerate(bar):
            given, prefix = states, f"{path}.{index}."
            inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            targets: Mapping[str, list[Tensor]] = {}
            if writers:
                targets, wanted = states_behind(block, whole[index], wanted, writers)
            block_run = _BlockRun(block, own[index], states, targets, damping)
            for layers in block_run.groups(inside):
                turn = block_run.turn(layers, prefix)
                if turn:
                    yield turn
                    block_run.replay(layers)
            states = block_run.outputs()
    if after and given:
        with dense_weights(model), _replayed(stacks[-1][1], given):
            behind = second_moment(model, windows, after)
        if behind is not None:
            yield Turn((after,), behind)


class _Reached(Exception):
    """A run of a block came to the layer that it was about."""


class _BlockRun:
    """One block on the states of every window, as often as it has layers; what is replaced computes once."""

    def __init__(
        self,
        block: nn.Module,
        calls: Sequence[Call],
        states: Sequence[Tensor],
        targets: Mapping[str, list[Tensor]],
        damping: float,
    ) -> None:
        self.block, self.calls, self.states, self.damping = block, calls, states, damping
        self.targets = targets
        self.inputs: list[list[Tensor]] = []  # of the turn, by window
        self.made: dict[nn.Module, list[Tensor | None]] = {}  # by layers of past turns, by window
        self.plain: dict[nn.Module, nn.Module] = {}  # which such layers are, unpacked
        self.often: set[str] = set()  # layers that a run calls more than once, or perhaps not at all

    def groups(self, names: Collection[str]) -> list[list[str]]:
        """The layers that read one tensor in a run on the first window, in order.

        Those that are not called once there come first, each alone: what others see must not change after
        their turn.
        """
        groups: dict[str, list[str]] = {}
        given: list[tuple[str, Tensor]] = []
        layers = {name: self.block.get_submodule(name) for name in names}
        with each_input(layers, lambda name, x: given.append((name, x))):
            self.calls[0].run(self.block, self.states[0])
        called = [name for name, _ in given]
        self.often = {name for name in names if called.count(name) != 1}
        read: list[tuple[str, Tensor]] = []
        for name, x in given:
            if name in self.often:
                continue
            leader = next((other for other, seen in read if seen is x), name)
            groups.setdefault(leader, []).append(name)
            read.append((name, x))
        return [*([name] for name in names if name in self.often), *groups.values()]

    def turn(self, layers: Sequence[str], prefix: str) -> Turn | None:
        """What these layers, which read one tensor, see now; None if no window reaches them."""
        first, gram = layers[0], Moment()
        layer = self.block.get_submodule(first)
        target = self.targets.get(first) if len(layers) == 1 and first not in self.often else None
        weight, bias = weight_of(layer), getattr(layer, "bias", None)
        cross = torch.zeros(weight.shape if target else (), dtype=torch.float64)
        writers = {name: self.block.get_submodule(name) for name in self.targets}
        self.inputs = []
        for window, states in enumerate(self.states):
            taken: list[Tensor] = []
            watched = each_input({first: layer}, self._taker(taken))
            with outputs_of(writers) as made, watched, suppress(_Reached):
                self._run(window)
            self.inputs.append(taken)
            for x in taken:
                rows = x.reshape(-1, x.shape[-1])
                quiet = hush(rows)
                rows = rows * quiet
                gram.add(rows)
                if target:
                    rest = target[window] - states - sum(made.values()) - (0 if bias is None else bias)
                    cross += ((rest.reshape(-1, rest.shape[-1]) * quiet).T @ rows).double()
        if not gram.count:
            return None
        names = tuple(prefix + name for name in layers)
        hessian = gram.mean()
        if not target or not hessian.any():
            return Turn(names, hessian)
        missed = cross / gram.count - weight.double() @ hessian
        move = ridge_step(missed, hessian, self.damping, gram.count)
        return Turn(names, hessian, {names[0]: move.float()})

    def _taker(self, taken: list[Tensor]) -> Callable[[str, Tensor], None]:
        def take(name: str, x: Tensor) -> None:
            taken.append(x.detach())
            if name not in self.often:
                raise _Reached

        return take

    def replay(self, layers: Sequence[str]) -> None:
        """Layers of the last turn, replaced by now, put out from here on what they make of what it saw. Those
        that are not called once a run, or with more than their input, compute, but unpack their weights no
        more."""
        for name in layers:
            layer = self.block.get_submodule(name)
            plain = dense(layer)
            if name in self.often or isinstance(layer, PackedStack):
                self.plain[layer] = plain
                continue
            with torch.no_grad():
                self.made[layer] = [plain(taken[0]) if taken else None for taken in self.inputs]

    def outputs(self) -> list[Tensor]:
        """The states of every window behind the block."""
        return [self._run(window) for window in range(len(self.calls))]

    def _run(self, window: int) -> Tensor:
        known = {layer: plain.forward for layer, plain in self.plain.items()}
        known |= {layer: partial(_answer, made[window]) for layer, made in self.made.items()}
        for layer, forward in known.items():
            layer.forward = forward
        try:
            return self.calls[window].run(self.block, self.states[window])
        finally:
            for layer in known:
                del layer.forward


def _answer(made: Tensor | None, *_args: Any, **_kwargs: Any) -> Tensor | None:
    return made


@contextmanager
def _replayed(stack: nn.ModuleList, given: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block, the last of a stack gets ``given``, one a run, and those between it and the first do
    not compute: what comes behind the stack sees the same, for the price of two blocks."""
    made: list[Any] = []
    runs = iter(given)

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        made[:] = [output]

    def put(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (next(runs), *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): next(runs)}

    between = list(stack)[1:-1]
    for block in between:
        block.forward = lambda *_args, **_kwargs: made[0]
    try:
        with (
            stack[0].register_forward_hook(keep),
            stack[-1].register_forward_pre_hook(put, with_kwargs=True),
        ):
            yield
    finally:
        for block in between:
            del block.forward
