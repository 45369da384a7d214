"""Calibration without data: text that the model itself writes, sampled once and kept.

    windows = sampled_windows(checkpoint, 16, 512)

What a model was trained on is rarely at hand, and any other text is of another kind. Its own samples are of
its own kind (Liu et al., "LLM-QAT: Data-Free Quantization Aware Training", arXiv:2305.17888, section 3.1).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from gemini.model.checkpoint import Checkpoint
from gemini.model.text import end_tokens

SEED = 0


def sampled_windows(
    checkpoint: Checkpoint, count: int, length: int, *, seed: int = SEED, progress: bool = True
) -> list[NDArray[np.int64]]:
    """``count`` windows (1, length) of token ids that a decoder samples at temperature 1, always the same.

    Each begins with the model's first token, or a random one where it has none, and never ends early. They
    are kept in the user's cache under the hash of the checkpoint; a damaged file there is made anew.
    """
    length = min(length, checkpoint.context_length or length)
    path = _cache() / f"{checkpoint.source['sha256'][:16]}-{count}x{length}-{seed}.npy"
    kept = _read(path, (count, length))
    if kept is None:
        kept = _sample(checkpoint, count, length, seed, progress)
        _write(path, kept)
    return list(kept[:, None])


def _sample(checkpoint: Checkpoint, count: int, length: int, seed: int, progress: bool) -> NDArray[np.int64]:
    from transformers import LogitsProcessor, LogitsProcessorList

    model = checkpoint.model
    first = getattr(checkpoint.tokenizer, "bos_token_id", None)
    ends = end_tokens(model)
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(),
        tqdm(
            total=length,
            desc="sample calibration text",
            unit="token",
            delay=2,
            leave=False,
            disable=not progress,
        ) as bar,
    ):
        torch.manual_seed(seed)

        class Endless(LogitsProcessor):
            """Moves the bar, and no text ends: what ``min_new_tokens`` does for a tenth of all the time."""

            def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                bar.update()
                scores[:, ends] = -torch.inf
                return scores

        if first is None:
            start = torch.randint(int(model.config.vocab_size), (count, 1))
        else:
            start = torch.full((count, 1), int(first))
        generate: Any = model.generate
        tokens = generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=length - 1,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            logits_processor=LogitsProcessorList([Endless()]),
        )
    found: NDArray[np.int64] = tokens.numpy()
    return found


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "gemini-edge" / "calibration"


def _read(path: Path, shape: tuple[int, int]) -> NDArray[np.int64] | None:
    try:
        kept = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return kept if kept.shape == shape and kept.dtype == np.int64 else None


def _write(path: Path, tokens: NDArray[np.int64]) -> None:
    """Best effort: a cache that cannot be written costs time, not the result."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.save(file, tokens)
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
