"""What the twins of one trace share: the form, the positions of the tokens, the cache, the pending rotary
tables.

The functions that transformers' registries call get no argument of ours, so the state of the trace that is
running is kept here and set by a context manager.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gemini.errors import ExportError
from gemini.export.forms import Form

if TYPE_CHECKING:
    from gemini.export.twins.cache import CrossCache, GraphCache


class FormMismatch(Exception):
    """This form cannot express the model; the exporter tries the next one."""


@dataclass(frozen=True)
class RotaryTables:
    """Half-width tables (positions, rotary_dim / 2) float32 and whether pairs are interleaved."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool


@dataclass
class TraceState:
    """Mutable state of one trace."""

    form: Form
    cache: GraphCache | None = None
    cross: CrossCache | None = None
    pending_rotary: RotaryTables | None = None
    logit_positions: torch.Tensor | None = None

    def take_rotary(self) -> RotaryTables | None:
        """The tables that the rotary function left for the next attention call, once."""
        tables, self.pending_rotary = self.pending_rotary, None
        return tables


_current: list[TraceState] = []


def current_trace() -> TraceState:
    """The state of the running trace."""
    if not _current:
        raise ExportError(
            "The exporter's attention was called outside an export.",
            "Load the checkpoint again before using it in torch.",
        )
    return _current[-1]


@contextmanager
def tracing(form: Form) -> Iterator[TraceState]:
    """Make a fresh state current while the block runs."""
    state = TraceState(form)
    _current.append(state)
    try:
        yield state
    finally:
        _current.remove(state)
