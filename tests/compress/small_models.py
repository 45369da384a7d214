"""A small Llama, token windows for it, and recipes run on it."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gemini.compress.apply import run_recipe
from gemini.compress.recipe import Recipe


def make_llama(tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_windows(count: int = 3, length: int = 24, vocabulary: int = 160) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocabulary, (1, length)) for _ in range(count)]


def run(model: nn.Module, *specs, calibration=None):
    return run_recipe(
        SimpleNamespace(model=model, family="decoder"), Recipe("test", specs), calibration, progress=False
    )


def logits_of(model: nn.Module, windows) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.as_tensor(window)).logits for window in windows])
