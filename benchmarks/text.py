"""The text that models are calibrated on and judged by.

Without a file from the user it is what every CPython carries, the help topics of ``pydoc_data.topics``:
English technical prose, 0.4 MB, no download. Its two halves share no paragraph, and their SHA-256 goes into
the report, because the topics differ between Python versions and so do figures measured on them.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemini.errors import UsageError

Item = TypeVar("Item")

MAX_TEXT_BYTES = 64 * 1024 * 1024
# Characters that plain text never holds: C0 controls except tab, newline, form feed and carriage return.
_BINARY = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")
_MARKUP = re.compile(r"^\s|[|+=]{2}|::=|>>>|^[-*+#.]|\*{3}|-{3}|={3}|~{3}", re.MULTILINE)


@dataclass(frozen=True)
class TextSource:
    """One text and where it came from; ``sha256`` is over its UTF-8 bytes."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Name, hash and length in characters: what the report records."""
        return {"name": self.name, "sha256": self.sha256, "characters": len(self.text)}


@dataclass(frozen=True)
class DefaultText:
    """The two halves of the built-in text; no paragraph is in both."""

    calibration: str
    evaluation: str
    calibration_sha256: str
    evaluation_sha256: str
    name: str = "pydoc_data.topics"


def shipped_text() -> TextSource:
    """The half of the built-in text to calibrate on and to learn from."""
    built_in = default_text()
    return TextSource(f"{built_in.name}, first half", built_in.calibration)


def default_text() -> DefaultText:
    """Split the help topics, in alphabetical order, into halves of about equal length.

    Topics nest (``compound`` repeats ``while``), so splitting by topic alone would leak: a paragraph counts
    only where it is first met, and the split falls on the topic boundary nearest to half of what is left.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: list[str] = []
    for _, body in sorted(topics.items()):
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", body):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.strip("\n"))
        if paragraphs:
            kept.append("\n\n".join(paragraphs))
    lengths = np.cumsum([len(topic) for topic in kept])
    cut = int(np.abs(lengths - lengths[-1] / 2).argmin()) + 1
    calibration, evaluation = "\n\n".join(kept[:cut]), "\n\n".join(kept[cut:])
    return DefaultText(
        calibration, evaluation, TextSource("", calibration).sha256, TextSource("", evaluation).sha256
    )


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file of at most 64 MB (a byte order mark is dropped).

    Raises UsageError for a file that is missing, a folder, empty or only white space, too large, binary or
    not UTF-8.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"There is no text file {path}.", "Check the path.") from None
    except OSError as error:
        raise UsageError(
            f"The text file {path} cannot be read ({error.strerror}).", "Give a readable file."
        ) from None
    if len(data) > MAX_TEXT_BYTES:
        raise UsageError(
            f"The text file {path} is larger than {MAX_TEXT_BYTES >> 20} MB.", "Give a shorter excerpt."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The text file {path} is not UTF-8 (byte {error.start}).", "Convert it to UTF-8 first."
        ) from None
    if _BINARY.search(text):
        raise UsageError(f"The file {path} holds binary data, not text.", "Give a plain text file in UTF-8.")
    if not text.strip():
        raise UsageError(f"The text file {path} is empty.", "Give a file with some text in it.")
    return text


def token_windows(ids: ArrayLike, window: int, count: int) -> list[NDArray[np.int64]]:
    """Cut ``count`` windows of ``window`` tokens, evenly spread over the text and never overlapping.

    ids: token ids of the whole text, (n,). Returns arrays (1, window) int64. A text with room for fewer
    windows gives fewer; one shorter than a window gives a single short one; fewer than two tokens raise
    UsageError, because a next-token score needs a token and its successor.
    """
    tokens = np.asarray(ids, dtype=np.int64).reshape(-1)
    if window < 2 or count < 1:
        raise UsageError(
            f"{count} windows of {window} tokens cannot be scored.", "Ask for 1 of 2 tokens or more."
        )
    if tokens.size < 2:
        raise UsageError("The text is shorter than two tokens.", "Give a longer text.")
    if tokens.size < window:
        return [tokens[None, :]]
    count = min(count, tokens.size // window)
    # Neighbouring starts are (size - window) / (count - 1) >= window apart, so rounding down cannot make them
    # overlap.
    starts = [index * (tokens.size - window) // max(count - 1, 1) for index in range(count)]
    return [tokens[None, start : start + window].copy() for start in starts]


def split_sentences(text: str, shortest: int = 40, longest: int = 200) -> list[str]:
    """Whole prose sentences of ``shortest`` to ``longest`` characters, each once, in order.

    Code, tables, headings and lists are left out: a sentence encoder should be judged on sentences.
    """
    found: dict[str, None] = {}
    for paragraph in re.split(r"\n\s*\n", text):
        if _MARKUP.search(paragraph):
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[\"A-Z])", " ".join(paragraph.split())):
            if shortest <= len(sentence) <= longest and sentence[0].isupper() and sentence[-1] in ".!?":
                found[sentence] = None
    return list(found)


def default_sentences(count: int = 300) -> list[str]:
    """``count`` sentences, evenly spread over the evaluation half of the built-in text."""
    return spread(split_sentences(default_text().evaluation), count)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` of the items, evenly spread, in their order."""
    if len(items) <= count:
        return list(items)
    return [items[int(i * len(items) / count)] for i in range(count)]
