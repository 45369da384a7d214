"""What models are measured and calibrated on: windows of text, the user's images, synthetic pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gemini.benchmarks.text import TextSource, split_sentences, spread, token_windows
from gemini.errors import UsageError
from gemini.model.checkpoint import Checkpoint
from gemini.model.vision import normalized_preprocessor
from gemini.runtime.vision import parse_preprocessing, preprocess_images

WINDOW, WINDOWS = 512, 4
IMAGES = 64
CALIBRATION_IMAGES, IMAGE_BATCH = 256, 8
PROMPT_TOKENS, NEW_TOKENS = 128, 64

Score = dict[str, Any]


def pictures(shape: Sequence[int], count: int = IMAGES) -> torch.Tensor:
    """Seeded pictures (count, C, H, W): smooth colour fields with noise, the spectrum of real images."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, shape[0], 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=tuple(shape[1:]), mode="bilinear")
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


def image_windows(checkpoint: Checkpoint, folder: Path) -> tuple[list[dict[str, torch.Tensor]], int]:
    """The images of a folder as batches of pixels, as the model will get them; and how many there are.

    Of more than CALIBRATION_IMAGES an even choice is taken.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise UsageError(f"There are no images in {str(folder)!r}.", "Name a folder of pictures.")
    paths = spread(paths, min(len(paths), CALIBRATION_IMAGES))
    pixels = preprocess_images(paths, parse_preprocessing(normalized_preprocessor(checkpoint.processor)))
    batches = torch.from_numpy(pixels).split(IMAGE_BATCH)
    return [{"pixel_values": batch} for batch in batches], len(paths)


def sentence_windows(checkpoint: Checkpoint, text: TextSource, count: int) -> list[NDArray[np.int64]]:
    """``count`` sentences (1, S) as an encoder reads them: between special tokens, where its outliers are."""
    assert checkpoint.tokenizer is not None
    longest = checkpoint.context_length
    ids = [
        checkpoint.tokenizer(sentence, truncation=longest is not None, max_length=longest)["input_ids"]
        for sentence in spread(split_sentences(text.text), count)
    ]
    return [np.array([row]) for row in ids]


def text_windows(
    checkpoint: Checkpoint, text: TextSource, count: int, window: int = WINDOW, reserved: int = 0
) -> list[NDArray[np.int64]]:
    """The text as ``count`` windows (1, window) of token ids, with ``reserved`` at most the context."""
    assert checkpoint.tokenizer is not None
    ids = checkpoint.tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    return token_windows(ids, min(window, (checkpoint.context_length or window) - reserved), count)
