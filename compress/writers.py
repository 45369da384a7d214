"""Linear layers that write to the states of a model, found by running a block, and how to correct them.

The states of a Transformer are a sum: each block adds what its last products put out. An error in the states
that is linear in what such a product reads can be taken out again by that product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gemini.compress.stream import Call
from gemini.compress.structure import plain_linears, size_of
from gemini.model.hooks import hooked

_EXACT = 1e-4  # of the largest state: what rounding may do to a sum


def find_writers(block: nn.Module, call: Call, states: Tensor) -> list[str]:
    """The linear layers whose output is added to the states as it is, in the order in which they run.

    Tried from the last to the first, each with the outputs of those behind it fixed.
    """
    layers = {name: m for name, m in plain_linears(block).items() if size_of(m)[0] == states.shape[-1]}
    with outputs_of(layers) as plain:
        after = call.run(block, states)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for name, output in reversed(plain.items()):
        if output.shape != after.shape:
            continue
        scale = float(output.abs().max())
        added = scale * torch.randn(output.shape, generator=generator).to(output)
        with outputs_of(layers, {**found, name: output + added}):
            moved = call.run(block, states) - after
        if float((moved - added).abs().max()) <= _EXACT * max(float(after.abs().max()), scale):
            found[name] = output
    return list(found)[::-1]


def states_behind(
    block: nn.Module, calls: Sequence[Call], states: Sequence[Tensor], writers: Sequence[str]
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """The states of every window behind each writer and behind the block; none behind writers if the states
    behind this block are no sum of those before it and what was written."""
    layers = {name: block.get_submodule(name) for name in writers}
    behind: dict[str, list[Tensor]] = {name: [] for name in writers}
    outputs: list[Tensor] = []
    for call, before in zip(calls, states, strict=True):
        with outputs_of(layers) as made:
            outputs.append(call.run(block, before))
        if behind and len(made) == len(layers) and _is_sum(outputs[-1], before, *made.values()):
            for name, written in made.items():
                before = before + written
                behind[name].append(before)
        else:
            behind = {}
    return behind, outputs


def _is_sum(after: Tensor, before: Tensor, *written: Tensor) -> bool:
    """Whether the states behind a block are those before it and what was written, up to rounding."""
    wrong = after - before - sum(written)
    return float(wrong.abs().max()) <= _EXACT * float(after.abs().max())


def ridge_step(cross: Tensor, gram: Tensor, damping: float, count: int) -> Tensor:
    """D = argmin E |r - D z|^2 + lambda |D|^2 = E[r z^T] (E[z z^T] + lambda I)^-1, float64 (N, K).

    Ridge regression (Hoerl and Kennard, 1970) over ``count`` rows. ``cross`` (N, K) and ``gram`` (K, K), not
    all zero, are float64, means or sums alike. ``damping`` is in tokens for each feature of z: lambda is that
    many times the size of z times the mean of E[z^2], by the number of rows.
    """
    ridge = damping * float(gram.trace()) / count
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return torch.cholesky_solve(cross.T, factor).T


@contextmanager
def outputs_of(
    layers: Mapping[str, nn.Module], put: Mapping[str, Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """What the layers put out inside the block, by name in the order of their last calls; those named in
    ``put`` put out that instead."""
    made: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., Tensor]:
        def take(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            made.pop(name, None)
            made[name] = (put or {}).get(name, output)
            return made[name]

        return take

    with hooked(layer.register_forward_hook(hook(name)) for name, layer in layers.items()):
        yield made
