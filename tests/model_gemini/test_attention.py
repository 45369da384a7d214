"""Attention against torch.nn.functional and torch.nn.MultiheadAttention."""

from typing import Any

import pytest
import torch
from torch import nn

from gemini.model.gemini.attention import MultiHeadAttention, scaled_dot_product

TOLERANCE = 1e-5  # float32 sums in another order


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_formula_equals_torch(masked: bool, scaling: float | None) -> None:
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = torch.zeros(2, 1, 5, 7)
    if masked:
        mask[1, :, :, 4:] = torch.finfo(torch.float32).min
    output, weights = scaled_dot_product(nn.Identity(), query, key, value, mask, scaling)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5), atol=TOLERANCE, rtol=0)
    assert (weights[1, :, :, 4:] == 0).all() == masked


def test_weights_are_dropped_in_training_only() -> None:
    query = key = value = torch.randn(1, 1, 4, 8)
    module = nn.Identity()
    _, kept = scaled_dot_product(module.eval(), query, key, value, None, dropout=0.5)
    _, dropped = scaled_dot_product(module.train(), query, key, value, None, dropout=0.5)
    assert (kept > 0).all()
    assert (dropped == 0).any()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_equals_torch(tiny: Any, copy_attention: Any, implementation: str, cross: bool) -> None:
    config = tiny(attn_implementation=implementation)
    ours = MultiHeadAttention(config).eval()
    theirs = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    copy_attention(ours, theirs)
    states, memory = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
    output, weights = ours(states, memory if cross else None)
    source = memory if cross else states
    expected, maps = theirs(states, source, source, average_attn_weights=False)
    torch.testing.assert_close(output, expected, atol=TOLERANCE, rtol=0)
    if implementation == "eager":
        torch.testing.assert_close(weights, maps, atol=TOLERANCE, rtol=0)
