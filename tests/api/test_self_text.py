"""Text that a model writes for its own calibration: its own distribution, the same every time, kept."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gemini.self_text import sampled_windows


@dataclasses.dataclass
class Tokenizer:
    bos_token_id: int | None = 1


@dataclasses.dataclass
class Small:
    model: object
    tokenizer: object = dataclasses.field(default_factory=Tokenizer)
    context_length: int | None = 64
    source: dict = dataclasses.field(default_factory=lambda: {"sha256": "0" * 64})


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "initializer_range": 0.5}
    config = LlamaConfig(vocab_size=8, num_attention_heads=2, eos_token_id=2, bos_token_id=1, **sizes)
    return Small(LlamaForCausalLM(config).eval())


def test_windows_are_the_same_every_time_and_kept(checkpoint, tmp_path):
    before = torch.random.get_rng_state()
    windows = sampled_windows(checkpoint, 3, 20, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [window.shape for window in windows] == [(1, 20)] * 3 and windows[0].dtype == np.int64
    assert all(window[0, 0] == 1 for window in windows)
    (path,) = (tmp_path / "gemini-edge" / "calibration").iterdir()
    own, checkpoint.model = checkpoint.model, None  # not asked again
    np.testing.assert_array_equal(sampled_windows(checkpoint, 3, 20), windows)
    path.write_bytes(b"damaged")
    checkpoint.model = own
    np.testing.assert_array_equal(sampled_windows(checkpoint, 3, 20, progress=False), windows)
    assert any(
        (a != b).any() for a, b in zip(sampled_windows(checkpoint, 3, 20, seed=1), windows, strict=True)
    )


def test_tokens_come_as_often_as_the_model_says(checkpoint):
    windows = np.concatenate(sampled_windows(checkpoint, 2000, 2, progress=False))
    with torch.no_grad():
        logits = checkpoint.model(torch.tensor([[1]])).logits[0, 0]
    logits[2] = -torch.inf  # text does not end
    expected = logits.softmax(-1).numpy()
    found = np.bincount(windows[:, 1], minlength=8) / len(windows)
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / len(windows) ** 0.5)


def test_a_model_without_a_first_token_and_a_short_context(checkpoint):
    checkpoint.tokenizer.bos_token_id, checkpoint.context_length = None, 12
    windows = sampled_windows(checkpoint, 30, 20, progress=False)
    assert {window.shape for window in windows} == {(1, 12)}
    assert len({int(window[0, 0]) for window in windows}) > 3


def test_a_cache_that_cannot_be_written_does_no_harm(checkpoint, tmp_path):
    (tmp_path / "gemini-edge").write_text("in the way")
    assert len(sampled_windows(checkpoint, 2, 8, progress=False)) == 2
