"""What a compression calibrates on, where the user names nothing and where one names a text or images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemini.benchmarks.text import TextSource, shipped_text
from gemini.errors import UsageError
from gemini.model.checkpoint import Checkpoint
from gemini.samples import image_windows, sentence_windows, text_windows
from gemini.self_text import SEED, sampled_windows

CALIBRATION_WINDOWS, CALIBRATION_WINDOW = 12, 256
# A step of 64 rows takes a fifth longer than one of 16.
SAMPLES, SAMPLE_LENGTH = 64, 128
# Windows of the built-in text beside them: technical English, which a model's own samples hold little of.
BESIDE = SAMPLES // 2
CALIBRATION_SENTENCES = 100


def only_text(given: TextSource | Path | None) -> TextSource | None:
    """What a model that reads text may calibrate on; UsageError for a folder."""
    if isinstance(given, Path):
        raise UsageError(f"{given.name} is a folder.", "Name a file of text: this model reads text.")
    return given


def calibration_windows(
    checkpoint: Checkpoint,
    given: TextSource | Path | None = None,
    progress: bool = True,
    own: bool = True,
) -> tuple[list[Any], dict[str, Any]]:
    """Windows of token ids (1, S), or batches of pixels, to calibrate on, and what to report about them.

    Of the user's text, or folder of images, where there is one. Else a decoder calibrates on what it writes
    itself (``own``), which is nearer to what it was trained on than any text at hand, and on some of the
    built-in text; other models on the built-in text, and image models on nothing. UsageError for a text where
    images are needed, or the other way round.
    """
    if checkpoint.family == "vision":
        if isinstance(given, TextSource):
            raise UsageError(f"{given.name} is no folder of images.", "Name one: this model reads images.")
        if given is None:
            return [], {}
        images, count = image_windows(checkpoint, given)
        return images, {"name": given.name, "images": count}
    windows, described = _token_windows(checkpoint, only_text(given), progress, own)
    return windows, {**described, "tokens": sum(window.size for window in windows)}


def _token_windows(
    checkpoint: Checkpoint, text: TextSource | None, progress: bool, own: bool
) -> tuple[list[NDArray[np.int64]], dict[str, Any]]:
    if checkpoint.tokenizer is None:
        return [], {}
    if text is None and own and checkpoint.family == "decoder":
        windows = sampled_windows(checkpoint, SAMPLES, SAMPLE_LENGTH, progress=progress)
        shipped = shipped_text()
        beside = text_windows(checkpoint, shipped, BESIDE, SAMPLE_LENGTH)
        # In turn, as some passes look at the first few windows alone.
        mixed = [each for three in zip(windows[::2], windows[1::2], beside, strict=False) for each in three]
        return mixed, {"name": f"sampled from the model itself, and {shipped.name}", "seed": SEED}
    text = text or shipped_text()
    if checkpoint.family == "encoder":
        return sentence_windows(checkpoint, text, CALIBRATION_SENTENCES), text.to_dict()
    return text_windows(checkpoint, text, CALIBRATION_WINDOWS, CALIBRATION_WINDOW), text.to_dict()
