"""Which outputs of which layers can be cut together, found by running the model: no architecture is named.

    found = find_couplings(model, window)
    for coupling in found.couplings:
        coupling.producers, coupling.consumer, coupling.columns

A NaN survives every arithmetic operation, so it marks what depends on what. An output of a linear layer is
made NaN in one row of a batch, and the inputs of the other linear layers of the block that turn NaN in that
row are those which depend on it. A feed-forward unit reaches one input of the layer behind it. A value
reaches the same place of every head that shares it, a query all of its head, a key all heads that share it.
Outputs that reach a common input belong together (Fang et al., "DepGraph", arXiv:2301.12900, section 3.1,
find such groups on a traced graph; the marks need none). Layers packed into one matrix come apart on the way,
because marks are followed output by output.

While marks are followed, linear layers return fixed numbers instead of their products: a mark then stops at
the first layer that it reaches, and a whole block costs as little as its activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from gemini.compress.calibrate import Window, as_feed, shortcut
from gemini.compress.select import Skipped
from gemini.compress.stream import find_stacks
from gemini.model.hooks import hooked

_TOKENS = 4  # of a window of token ids: enough for a mask to hide something
_MOST_MARKS, _FEWEST_MARKS, _POSITIONS = 64, 4, 512  # rows of a batch, and rows x positions


@dataclass(frozen=True)
class Coupling:
    """The units of one consumer: each can be cut without touching the others.

    ``producers`` {layer: int64 (units, outputs per unit)}, ``consumer`` the layer that reads them,
    ``columns`` int64 (units, inputs per unit), all ascending within a unit; every output of the producers
    and every input of the consumer is in exactly one unit. ``stack`` and ``block`` say where it is.
    """

    stack: str
    block: int
    producers: Mapping[str, Tensor]
    consumer: str
    columns: Tensor

    @property
    def units(self) -> int:
        return self.columns.shape[0]

    @property
    def kind(self) -> str:
        """ "width": units of one input each; "heads": attention heads that share a key and a value."""
        return "width" if self.columns.shape[1] == 1 else "heads"

    @property
    def site(self) -> str:
        """The consumer's name inside of its block."""
        return self.consumer.removeprefix(f"{self.stack}.{self.block}.")


@dataclass(frozen=True)
class Structure:
    """What can be cut, and layers between which nothing can, with the reason."""

    couplings: tuple[Coupling, ...]
    refused: tuple[Skipped, ...]


def plain_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers (also transformers' Conv1D) that compute what their class says, by name."""
    return {name: module for name, module in model.named_modules() if _is_plain(module)}


def find_couplings(model: nn.Module, window: Window, *, progress: bool = True) -> Structure:
    """The units of every block of every stack of ``model``, in the order of the blocks.

    ``window`` (1, S) token ids or a mapping of keyword arguments with one example; of plain token ids a few
    are used. Only the first block of a stack is followed output by output; each other one is checked against
    it with outputs marked at random, and followed itself if it differs.
    """
    linears = plain_linears(model)
    stacks = find_stacks(model, linears)
    couplings: list[Coupling] = []
    refused = [] if stacks else [Skipped("", "the model has no stack of two or more equal blocks")]
    rows, calls = _record(model, [stack for _, stack in stacks], _shorten(window))
    for (path, stack), made in zip(stacks, calls, strict=True):
        if any(len(each) != 1 for each in made):
            refused.append(Skipped(path, "its blocks are not called once each in a run"))
            continue
        first: dict[str, _Reach] | None = None
        for index, block in enumerate(
            tqdm(stack, desc=f"structure {path}", unit="block", delay=2, leave=False, disable=not progress)
        ):
            inside = f"{path}.{index}."
            layers = {n.removeprefix(inside): m for n, m in linears.items() if n.startswith(inside)}
            probe = _Probe(block, made[index][0], layers, rows)
            try:
                same = first is not None and first.keys() == layers.keys() and probe.agrees(first)
                reach = first if same and first is not None else probe.follow_all()
            except Exception as error:  # whatever a block's own code says to a NaN, as one that picks experts
                refused.append(Skipped(inside.rstrip("."), f"it does not run on marked numbers: {error}"))
                continue
            first = reach if first is None else first
            lost = [name for name, each in reach.items() if each.lost]
            if lost:  # then what depends on what is not known of the others either
                refused.append(Skipped(inside.rstrip("."), f"outputs of {lost[0]} reach nothing"))
                continue
            for site in _sites(reach):
                units = _units(site, reach)
                if isinstance(units, str):
                    refused.append(Skipped(f"{inside}{site.consumers[0]}", units))
                else:
                    producers = {f"{inside}{name}": table for name, table in units[0].items()}
                    couplings.append(
                        Coupling(path, index, producers, f"{inside}{site.consumers[0]}", units[1])
                    )
    return Structure(tuple(couplings), tuple(refused))


def _is_plain(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear | Conv1D) or torch.nn.utils.parametrize.is_parametrized(module):
        return False
    if "forward" in module.__dict__:  # wrapped by a library
        return False
    # torch's fused attention reads the weight of such a layer without calling it.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return type(module).forward is (Conv1D if isinstance(module, Conv1D) else nn.Linear).forward


def size_of(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    first, second = layer.weight.shape
    return (second, first) if isinstance(layer, Conv1D) else (first, second)


def _shorten(window: Window) -> Window:
    """The first few tokens of a window that is token ids and masks of them throughout."""
    if not isinstance(window, Mapping):
        return torch.as_tensor(window)[:, :_TOKENS]
    feed = as_feed(window)
    if any(value.dim() != 2 or value.is_floating_point() for value in feed.values()):
        return window
    return {key: value[:, :_TOKENS] for key, value in feed.items()}


_Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def _record(
    model: nn.Module, stacks: Sequence[nn.ModuleList], window: Window
) -> tuple[int, list[list[list[_Call]]]]:
    """Rows of a batch that fit, and how that batch calls each block: [stack][block][call]."""
    feed = as_feed(window)
    rows = _MOST_MARKS
    calls = _run_batch(model, stacks, feed, 1)
    positions = max(
        (_first_tensor(*each[0]).shape[1:-1].numel() for s in calls for each in s if each), default=1
    )
    rows = min(_MOST_MARKS, max(_FEWEST_MARKS, _POSITIONS // max(1, positions)))
    return rows, _run_batch(model, stacks, feed, rows)


def _run_batch(
    model: nn.Module, stacks: Sequence[nn.ModuleList], feed: Mapping[str, Tensor], rows: int
) -> list[list[list[_Call]]]:
    """Calls of every block for one example repeated ``rows`` times."""
    calls: list[list[list[_Call]]] = [[[] for _ in stack] for stack in stacks]

    def recorder(into: list[_Call]) -> Callable[..., None]:
        return lambda _module, args, kwargs: into.append((args, kwargs))

    hooks = (
        block.register_forward_pre_hook(recorder(into), with_kwargs=True)
        for stack, lists in zip(stacks, calls, strict=True)
        for block, into in zip(stack, lists, strict=True)
    )
    batch = {
        key: value.expand(rows, *value.shape[1:]).clone() if value.dim() and len(value) == 1 else value
        for key, value in feed.items()
    }
    with hooked(hooks), torch.no_grad():
        model(**batch, **shortcut(model))
    return calls


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


@dataclass(frozen=True)
class _Reach:
    """Where the outputs (N) of one layer arrive: at inputs of others, {layer: bool (N, K)}, and behind the
    block, bool (N,)."""

    inputs: dict[str, Tensor]
    behind: Tensor

    @property
    def lost(self) -> bool:
        """Whether the layer was called, and no output arrived anywhere."""
        arrived = [bool(hits.any()) for hits in self.inputs.values()]
        return bool(arrived) and not any(arrived) and not bool(self.behind.any())


class _Probe:
    """One block, how it is called, and the linear layers in it."""

    def __init__(self, block: nn.Module, call: _Call, layers: Mapping[str, nn.Module], rows: int) -> None:
        self.block, self.call, self.layers, self.rows = block, call, layers, rows

    def follow_all(self) -> dict[str, _Reach]:
        """Every output of every layer on its own."""
        return {name: self._follow(name) for name in self.layers}

    def agrees(self, reach: Mapping[str, _Reach]) -> bool:
        """Whether marks set at random arrive where ``reach`` has them; each row with another density."""
        generator = torch.Generator().manual_seed(0)
        for name, layer in self.layers.items():
            outputs = size_of(layer)[0]
            if reach[name].behind.shape != (outputs,):
                return False
            halvings = max(1, outputs.bit_length() - 1)
            density = 0.5 ** (1 + torch.arange(self.rows) % halvings)
            marks = torch.rand(self.rows, outputs, generator=generator) < density[:, None]
            found, expected = self._run(name, marks), reach[name]
            chosen = marks.float()
            if not torch.equal(found.behind, chosen @ expected.behind.float() > 0):
                return False
            if found.inputs.keys() != expected.inputs.keys():
                return False
            for other, hits in found.inputs.items():
                known = expected.inputs[other].float()
                if known.shape[1] != hits.shape[1] or not torch.equal(hits, chosen @ known > 0):
                    return False
        return True

    def _follow(self, name: str) -> _Reach:
        outputs = size_of(self.layers[name])[0]
        parts = []
        for start in range(0, outputs, self.rows):
            marks = torch.zeros(self.rows, outputs, dtype=torch.bool)
            marked = torch.arange(start, min(start + self.rows, outputs))
            marks[marked - start, marked] = True
            part = self._run(name, marks)
            parts.append((len(marked), part))
        reached = {key for _, part in parts for key in part.inputs}
        inputs = {
            key: torch.cat([part.inputs[key][:count] for count, part in parts]) for key in sorted(reached)
        }
        return _Reach(inputs, torch.cat([part.behind[:count] for count, part in parts]))

    def _run(self, name: str, marks: Tensor) -> _Reach:
        """One run of the block with the outputs of a layer NaN where ``marks`` (rows, N) says."""
        seen: dict[str, Tensor] = {}
        args, kwargs = self.call
        # torch's fused attention on CPU returns numbers where a query or key is NaN; its plain form does not.
        plain = sdpa_kernel(SDPBackend.MATH)
        with torch.no_grad(), plain, _stand_ins(self.layers, name, marks, seen):
            made = self.block(*args, **kwargs)
        states = made[0] if isinstance(made, tuple) else made
        return _Reach(seen, states.isnan().reshape(self.rows, -1).any(1))


@contextmanager
def _stand_ins(
    layers: Mapping[str, nn.Module], marked: str, marks: Tensor, seen: dict[str, Tensor]
) -> Iterator[None]:
    """Inside the block linear layers return fixed numbers, one of them with marks, and note NaN inputs."""
    rows = len(marks)

    def stand_in(name: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        outputs = size_of(layer)[0]
        numbers = torch.linspace(0.5, 1.0, outputs)

        def forward(x: Tensor) -> Tensor:
            # All positions of a row carry the mark, so that no mask can hide it.
            hits = x.isnan().reshape(rows, -1, x.shape[-1]).any(1)
            seen[name] = seen[name] | hits if name in seen else hits
            made = numbers.to(x.dtype).expand(*x.shape[:-1], outputs).clone()
            if name == marked:
                grid = made.view(rows, -1, outputs)
                grid.masked_fill_(marks[:, None, :], float("nan"))
            return made

        return forward

    try:
        for name, layer in layers.items():
            layer.forward = stand_in(name, layer)
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


@dataclass(frozen=True)
class _Site:
    """Layers bound by marks: what the producers put out arrives at the consumers."""

    producers: tuple[str, ...]
    consumers: tuple[str, ...]


def _sites(reach: Mapping[str, _Reach]) -> list[_Site]:
    """Connected producers and consumers; layers whose outputs all leave the block produce nothing here."""
    edges: list[tuple[set[str], set[str]]] = []
    for name, found in reach.items():
        hit = {other for other, hits in found.inputs.items() if bool(hits.any())}
        if not hit or bool(found.behind.all()):
            continue
        producers, consumers = {name}, set(hit)
        for edge in [edge for edge in edges if edge[1] & hit]:
            edges.remove(edge)
            producers |= edge[0]
            consumers |= edge[1]
        edges.append((producers, consumers))
    order = list(reach)
    return [_Site(tuple(sorted(p, key=order.index)), tuple(sorted(c, key=order.index))) for p, c in edges]


def _units(site: _Site, reach: Mapping[str, _Reach]) -> tuple[dict[str, Tensor], Tensor] | str:
    """Rows of each producer and columns of the consumer by unit, or why the site cannot be cut."""
    if len(site.consumers) > 1:
        return f"its inputs also go into {', '.join(site.consumers[1:])}"
    hits = {name: reach[name].inputs[site.consumers[0]] for name in site.producers}
    for name, found in hits.items():
        if bool(reach[name].behind.any()):
            return f"outputs of {name} also go past it, out of the block"
        if not bool(found.any(1).all()):
            return f"outputs of {name} reach no linear layer"
    together = _components(torch.cat(list(hits.values())))
    if bool((together < 0).any()):
        return "some of its inputs come from no linear layer of the block"
    labels = together.unique()
    if len(labels) < 2:
        return f"every output of {' and '.join(site.producers)} reaches all of its inputs: one unit"
    if set(site.producers) & set(site.consumers):
        return "it reads its own output"
    columns = _table([(together == label).nonzero().flatten() for label in labels])
    # The component of an output is that of any input it reaches.
    reached = {name: together[found.int().argmax(1)] for name, found in hits.items()}
    producers = {
        name: _table([(arrived == label).nonzero().flatten() for label in labels])
        for name, arrived in reached.items()
    }
    if columns is None or any(table is None for table in producers.values()):
        return "its units are not of one size"
    return {name: table for name, table in producers.items() if table is not None}, columns


def _components(hits: Tensor) -> Tensor:
    """For each column of ``hits`` (outputs, columns) the lowest column it hangs together with, -1 if none."""
    labels = np.full(hits.shape[1], -1)
    touched = hits.any(0).numpy()
    labels[touched] = np.flatnonzero(touched)
    for row in hits.unique(dim=0).numpy():
        members = np.unique(labels[row])
        if len(members) > 1:
            labels[np.isin(labels, members)] = members[0]
    return torch.as_tensor(labels)


def _table(parts: Sequence[Tensor]) -> Tensor | None:
    """(units, size) from one index list a unit, None if they differ in length or are empty."""
    sizes = {len(part) for part in parts}
    return torch.stack(list(parts)) if len(sizes) == 1 and sizes != {0} else None
