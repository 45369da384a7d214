"""Tiny Gemini models with random weights, and their inputs."""

import os
from typing import Any

import pytest

# Read when transformers is imported, hence before.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch

from gemini.model.gemini import GeminiConfig

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "encoder_layers": 4,
    "max_position_embeddings": 40,
    "image_size": 16,
    "image_channels": (4, 6, 8),
}


@pytest.fixture(params=["early", "late", "hybrid"])
def fusion(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny() -> Any:
    """Make a tiny configuration with changes; seeds torch, so that a model made next is always the same."""

    def make(**changes: Any) -> GeminiConfig:
        torch.manual_seed(0)
        return GeminiConfig(**{**TINY, **changes})

    return make


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of encoder input: 7 tokens, and 4 with 3 of padding; an image (4 vectors) each."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 97, (2, 7), generator=generator)
    attention_mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return {
        "input_ids": input_ids.masked_fill(attention_mask == 0, 0),
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
    }


@pytest.fixture
def copy_attention() -> Any:
    """Copy the weights of our attention into `torch.nn.MultiheadAttention`, which keeps q, k, v in one."""

    def copy(ours: Any, theirs: Any) -> None:
        with torch.no_grad():
            for name in ("weight", "bias"):
                parts = [getattr(getattr(ours, f"{part}_proj"), name) for part in "qkv"]
                getattr(theirs, f"in_proj_{name}").copy_(torch.cat(parts))
                getattr(theirs.out_proj, name).copy_(getattr(ours.out_proj, name))

    return copy
