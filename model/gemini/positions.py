"""Where a vector stands: attention itself sees a set, so every position adds a vector of its own."""

import torch
from torch import nn

from gemini.model.gemini.configuration import GeminiConfig


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Vaswani et al. 2017, section 3.5: float32 (length, width).

    PE(pos, 2i) = sin(pos / 10000^(2i / width)), PE(pos, 2i + 1) = cos(pos / 10000^(2i / width)).
    """
    # float64 until the end: the angle of a late position loses digits in float32.
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


class SinusoidalPositions(nn.Module):
    """A fixed table; nothing to learn, nothing to store in a checkpoint."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("table", sinusoids(length, width), persistent=False)

    def reset(self) -> torch.Tensor:
        """The table computed anew, for models that are created without storage and filled later."""
        return sinusoids(*self.table.shape)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """positions int64 (..., T) -> (..., T, D)."""
        return nn.functional.embedding(positions, self.table)


class LearnedPositions(nn.Embedding):
    """One learned vector a position; positions int64 (..., T) -> (..., T, D)."""


class GridPositions(nn.Module):
    """Learned positions of a square grid: a vector for the row plus a vector for the column."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(side, width)
        self.columns = nn.Embedding(side, width)

    def forward(self) -> torch.Tensor:
        """(side * side, D), row by row."""
        return (self.rows.weight[:, None] + self.columns.weight[None]).flatten(0, 1)


def text_positions(config: GeminiConfig) -> nn.Module:
    """The positions of a text, as configured."""
    kind = {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions}[config.positions]
    return kind(config.max_position_embeddings, config.hidden_size)
