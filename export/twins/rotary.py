"""Rotary embedding inside the attention operator.

Two twins work together. The module that computes cos and sin hands out constant half-width tables over all
positions, made by the original module itself, so any scaling rule comes along. The function that applies
them is classified by numbers (half-split or interleaved pairs) and only remembers the tables:
GroupQueryAttention rotates.

Source: Su et al. 2021, "RoFormer", equation 34; GroupQueryAttention inputs cos_cache and sin_cache.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gemini.export.trace_state import FormMismatch, RotaryTables, current_trace

# Tables grow with the context: 2 * positions * rotary_dim * 2 bytes. Beyond this the bundle's context is
# capped.
LONGEST_TABLE = 32768
# The CPU kernel rotates 8 pairs at a time and refuses other widths.
PAIRS_PER_STEP = 8


class RotaryTwin(nn.Module):
    """Stands in for a rotary module ``(x, position_ids, ...) -> (cos, sin)``; its result is never computed
    with."""

    def __init__(self, original: nn.Module, positions: int) -> None:
        super().__init__()
        self.original = [original]  # in a list, so that its buffers do not become parameters of the graph
        self.positions = positions
        self.made: dict[str, tuple[int, bool]] = {}

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key = repr((args, sorted(kwargs.items())))
        if key not in self.made:
            raise FormMismatch("a rotary module was called with arguments that its dry run did not see")
        index, _ = self.made[key]
        return getattr(self, f"cos{index}"), getattr(self, f"sin{index}")

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the original compute its tables for one way of being called."""
        key = repr((args, sorted(kwargs.items())))
        if key in self.made:
            return
        cos, sin, interleaved = _tables(self.original[0], self.positions, args, kwargs)
        index = len(self.made)
        self.register_buffer(f"cos{index}", cos)
        self.register_buffer(f"sin{index}", sin)
        self.made[key] = (index, interleaved)


def _tables(
    original: nn.Module, positions: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    def call(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.arange(count)[None]
        cos, sin = original(torch.zeros(1), ids, *args, **kwargs)
        return cos.float()[0], sin.float()[0]

    cos, sin = call(positions)
    short_cos, _ = call(16)
    if cos.dim() != 2 or not torch.allclose(cos[:16], short_cos, atol=1e-6, rtol=0):
        raise FormMismatch("rotary tables depend on the length of the sequence")
    half = cos.shape[-1] // 2
    if half and torch.equal(cos[:, :half], cos[:, half:]) and torch.equal(sin[:, :half], sin[:, half:]):
        return cos[:, :half].contiguous(), sin[:, :half].contiguous(), False
    if half and torch.equal(cos[:, ::2], cos[:, 1::2]) and torch.equal(sin[:, ::2], sin[:, 1::2]):
        return cos[:, ::2].contiguous(), sin[:, ::2].contiguous(), True
    return cos.contiguous(), sin.contiguous(), False  # already half width


def is_rotary_module(module: nn.Module) -> bool:
    """A module without parameters, called with positions, whose class says that it is a rotary embedding."""
    takes_positions = "position_ids" in inspect.signature(module.forward).parameters
    return type(module).__name__.endswith("RotaryEmbedding") and takes_positions


@contextmanager
def rotary_functions_deferred(model: nn.Module) -> Iterator[None]:
    """While the block runs, every rotary function in the model's own source files defers to attention.

    The functions are globals of the modeling file, so they are patched there and always put back.
    """
    undo: list[tuple[Any, str, Any]] = []
    files = {sys.modules[type(m).__module__] for m in model.modules() if "transformers" in type(m).__module__}
    try:
        for file in sorted(files, key=lambda f: f.__name__):
            for name, function in list(vars(file).items()):
                if _is_rotary_function(name, function):
                    undo.append((file, name, function))
                    setattr(file, name, _deferring(pair_layout(function)))
        yield
    finally:
        for file, name, function in undo:
            setattr(file, name, function)


def _is_rotary_function(name: str, function: object) -> bool:
    if not name.startswith("apply_") or "rotary" not in name or not callable(function):
        return False
    return {"q", "k", "cos", "sin"} <= set(inspect.signature(function).parameters)


def _deferring(interleaved: bool | None) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def deferred(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if interleaved is None:
            raise FormMismatch("the rotary function is neither half-split nor interleaved")
        if cos.shape[-1] % PAIRS_PER_STEP:
            raise FormMismatch(f"the kernel rotates multiples of {PAIRS_PER_STEP} pairs, not {cos.shape[-1]}")
        current_trace().pending_rotary = RotaryTables(cos, sin, interleaved)
        return q, k

    return deferred


def pair_layout(function: Callable[..., Any]) -> bool | None:
    """Which pairs a rotary function rotates: False half-split, True interleaved, None neither.

    Decided on arbitrary cos and sin, so agreement is agreement on every position and frequency.
    """
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 16, generator=generator) for heads in (2, 1))
    cos, sin = (torch.randn(5, 8, generator=generator) for _ in range(2))

    def half_split(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., :8], x[..., 8:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def interleaved(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    doubled = (lambda t: torch.cat([t, t], -1), lambda t: t.repeat_interleave(2, -1), lambda t: t)
    for widen in doubled:
        try:
            rotated_q, rotated_k = function(q, k, widen(cos)[None], widen(sin)[None])
        except Exception:  # this width is not the one the function takes
            continue
        for answer, reference in ((False, half_split), (True, interleaved)):
            same_q = rotated_q.shape == q.shape and torch.allclose(rotated_q, reference(q), atol=1e-5)
            if same_q and torch.allclose(rotated_k, reference(k), atol=1e-5):
                return answer
    return None
