"""The output head on the positions that are asked for.

A generator needs the logits of one position a call, an evaluation those of all; the vocabulary is the largest
product of a small model, so which positions is an input of the graph.
"""

from __future__ import annotations

import torch
from torch import nn

from gemini.export.trace_state import current_trace
from gemini.export.twins.operators import emit


class PickPositions(nn.Module):
    """Wraps the output head: only the positions asked for are multiplied with the vocabulary."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        positions = current_trace().logit_positions
        return self.head(hidden if positions is None else gather_positions(hidden, positions))


def gather_positions(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """hidden (B, S, D), positions (B, P) int64 -> (B, P, D), by GatherND with one batch dimension."""
    shape = (*positions.shape, hidden.shape[-1])
    return emit("GatherND", (hidden, positions.unsqueeze(-1)), {"batch_dims": 1}, shape, version=13)
