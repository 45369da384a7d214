"""The data that the Gemini family learns from: texts and pixels, no token ids.

    from gemini.model.data import default_cache, load_drawings
    drawings = load_drawings(default_cache(), "train")

`gemini-edge data` fills the cache (`gemini.model.data.build`); everything here reads it, without a network.
Importing this package is cheap: torch comes with `gemini.model.data.augment` alone.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemini.errors import DataError
from gemini.model.data.build import read_sources
from gemini.model.data.texts import Review, read_stories

__all__ = [
    "Drawings",
    "Review",
    "default_cache",
    "drawing_names",
    "load_drawings",
    "load_sentiment",
    "load_stories",
    "load_texts",
]


@dataclass(frozen=True)
class Drawings:
    """Drawings of one split; the i-th entries of all fields belong together.

    Attributes:
        pixels: (N, 64, 64, 4) uint8, RGBA with straight alpha.
        en: English names in lower case.
        zh: Chinese names.
        keys: code points, the same for one thing in all sets.
        sets: which set, that is whose hand.
    """

    pixels: NDArray[np.uint8]
    en: tuple[str, ...]
    zh: tuple[str, ...]
    keys: tuple[str, ...]
    sets: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)


def default_cache() -> Path:
    """``$GEMINI_EDGE_CACHE``, else ``gemini-edge/data`` in the user's cache folder."""
    chosen = os.environ.get("GEMINI_EDGE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemini-edge" / "data"


def drawing_names(cache: Path, split: str) -> list[tuple[str, str]]:
    """(English, Chinese) names of the drawings of a split, without reading their pixels."""
    return [(row["en"], row["zh"]) for row in _lines(cache, "drawings.jsonl") if row["split"] == split]


def load_drawings(cache: Path, split: str) -> Drawings:
    """The drawings of "train", "valid", "test" (another hand) or "unseen" (another hand, reserved names)."""
    rows = list(_lines(cache, "drawings.jsonl"))
    chosen = [index for index, row in enumerate(rows) if row["split"] == split]
    if not chosen:
        raise DataError(f"There is no split {split!r} of drawings.", "Use train, valid, test or unseen.")
    try:
        pixels = np.load(cache / "drawings.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _damaged(cache, "drawings.npy") from error
    if pixels.shape != (len(rows), 64, 64, 4) or pixels.dtype != np.uint8:
        raise _damaged(cache, "drawings.npy")
    columns = (tuple(rows[index][field] for index in chosen) for field in ("en", "zh", "key", "set"))
    return Drawings(np.ascontiguousarray(pixels[chosen]), *columns)


def load_sentiment(cache: Path, split: str, language: str | None = None) -> list[Review]:
    """The labelled reviews of "train", "valid" or "test", of one language ("en", "zh") or of both."""
    if language not in (None, "en", "zh"):
        raise DataError(f"There are no reviews in {language!r}.", "Use en or zh.")
    rows = _split(cache, "sentiment.jsonl", split)
    return [Review(**row) for row in rows if language in (None, row["language"])]


def load_texts(cache: Path, split: str) -> list[str]:
    """The unlabelled paragraphs of "train", "valid" or "test"."""
    return [row["text"] for row in _split(cache, "text.jsonl", split)]


def load_stories(cache: Path, split: str) -> list[str]:
    """The stories of stories.jsonl in "train", "valid" or "test", filtered and without duplicates."""
    _check_split(split)
    return [text for place, text in read_stories(cache / "stories.jsonl") if place == split]


def _split(cache: Path, name: str, split: str) -> list[dict[str, Any]]:
    _check_split(split)
    return [row for row in _lines(cache, name) if row["split"] == split]


def _check_split(split: str) -> None:
    if split not in ("train", "valid", "test"):
        raise DataError(f"There is no split {split!r}.", "Use train, valid or test.")


def _lines(cache: Path, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of a complete cache."""
    read_sources(cache)
    try:
        with (cache / name).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise _damaged(cache, name) from error


def _damaged(cache: Path, name: str) -> DataError:
    return DataError(f"{cache / name} is missing or damaged.", f"Run `gemini-edge data --cache {cache}`.")
