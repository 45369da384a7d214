"""Positions against the published formula."""

import math
from typing import Any

import torch

from gemini.model.gemini.embedders import TextEmbedder
from gemini.model.gemini.positions import GridPositions, sinusoids


def test_sinusoids_equal_the_published_formula() -> None:
    table = sinusoids(50, 12)
    for position in range(50):
        for pair in range(6):
            angle = position / 10000 ** (2 * pair / 12)
            # 1e-6: the float32 rounding of numbers up to 1.
            assert abs(table[position, 2 * pair].item() - math.sin(angle)) < 1e-6
            assert abs(table[position, 2 * pair + 1].item() - math.cos(angle)) < 1e-6


def test_grid_adds_row_and_column() -> None:
    grid = GridPositions(3, 5)
    vectors = grid()
    assert vectors.shape == (9, 5)
    for row in range(3):
        for column in range(3):
            expected = grid.rows.weight[row] + grid.columns.weight[column]
            assert torch.equal(vectors[3 * row + column], expected)


def test_tokens_are_scaled_for_sinusoids_only(tiny: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    learned = TextEmbedder(tiny()).eval()
    expected = learned.tokens.weight[ids] + learned.positions.weight[:3]
    torch.testing.assert_close(learned(ids), expected, atol=0, rtol=0)
    fixed = TextEmbedder(tiny(positions="sinusoidal")).eval()
    expected = fixed.tokens.weight[ids] * math.sqrt(32) + sinusoids(40, 32)[:3]
    torch.testing.assert_close(fixed(ids), expected, atol=1e-6, rtol=0)


def test_positions_may_start_anywhere_and_differ_by_row(tiny: Any) -> None:
    embedder = TextEmbedder(tiny()).eval()
    ids = torch.tensor([[5, 6], [5, 6]])
    moved = embedder(ids, torch.tensor([[0, 1], [7, 8]]))
    torch.testing.assert_close(moved[0], embedder(ids)[0], atol=0, rtol=0)
    expected = embedder.tokens.weight[ids[1]] + embedder.positions.weight[7:9]
    torch.testing.assert_close(moved[1], expected, atol=0, rtol=0)
