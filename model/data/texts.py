"""The texts of the training data: labelled reviews, paragraphs of documentation, sampled stories."""

import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

from gemini.errors import DataError
from gemini.model.data.bias import refusal
from gemini.model.data.splits import normalized, split_of


@dataclass(frozen=True)
class Review:
    """A labelled text: `label` is 1 for a positive and 0 for a negative one; `language` is "en" or "zh"."""

    text: str
    label: int
    language: str
    split: str


@dataclass(frozen=True)
class Paragraph:
    """An unlabelled text and where it comes from."""

    text: str
    split: str
    source: str


def build_sentiment(english: Iterable[bytes], positive: bytes, negative: bytes) -> list[Review]:
    """All reviews in a fixed order, 70 % train, 10 % valid, 20 % test, no text twice.

    Texts count as equal when they differ in case, spaces and punctuation only; one that carries both labels
    is dropped, as its label means nothing.

    Args:
        english: JSON lists of ``{"text", "class"}``, the fixtures of the package `sentiment`.
        positive: UTF-8 lines, one Chinese review a line.
        negative: the same.
    """
    labelled: list[tuple[str, int, str]] = []
    for fixture in english:
        labelled += [
            (entry["text"], entry["class"], "en")
            for entry in json.loads(fixture)
            if entry["class"] in (0, 1)  # each list ends with an empty text of no class
        ]
    for content, label in ((positive, 1), (negative, 0)):
        labelled += [(line, label, "zh") for line in content.decode("utf-8-sig").splitlines()]
    first: dict[str, Review] = {}
    ambiguous = set()
    for raw, label, language in labelled:
        text = " ".join(raw.split())
        key = normalized(text)
        if not key:
            continue
        review = first.setdefault(key, Review(text, label, language, split_of(text, 0.1, 0.2)))
        if review.label != label:
            ambiguous.add(key)
    return [review for key, review in first.items() if key not in ambiguous]


def build_texts() -> list[Paragraph]:
    """The prose paragraphs of the documentation that every CPython carries; code and tables are left out."""
    found: dict[str, Paragraph] = {}
    for topic in sorted(topics.topics):
        for block in re.split(r"\n\s*\n", topics.topics[topic]):
            text = " ".join(textwrap.dedent(block).split())
            if _is_prose(text):
                split = split_of(text, 0.03, 0.03)
                found.setdefault(normalized(text), Paragraph(text, split, "pydoc_data.topics"))
    return list(found.values())


def read_stories(path: Path) -> Iterator[tuple[str, str]]:
    """(split, story) of every story fit to learn from in a file of ``{"text", "prompt", "seed"}`` lines.

    Equal stories and the ones that `gemini.model.data.bias.refusal` names a reason for are left out. 3 % are
    held out for validation and as many for test. A file may still be growing: a last line without its end is
    left for later.

    Raises:
        DataError: the file is missing or a line is not such an object.
    """
    if not path.is_file():
        raise DataError(
            f"There are no stories at {path}.",
            "Write them with `gemini-edge stories`, or train without them.",
        )
    seen: set[str] = set()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            text = _story(line, path, number)
            if text is None or refusal(text) is not None:
                continue
            key = normalized(text)
            if key not in seen:
                seen.add(key)
                yield split_of(text, 0.03, 0.03), text


def _story(line: str, path: Path, number: int) -> str | None:
    """The text of a line; None for a story that was sampled and given up."""
    try:
        text = json.loads(line)["text"]
        if text is None or isinstance(text, str):
            return text
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f"Line {number} of {path} is no story.", "Delete the line, or sample the stories again.")


def _is_prose(text: str) -> bool:
    """At least ten words, a sentence's end, and mostly letters."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text.split()) >= 10 and text[-1] in ".:!?" and letters / len(text) >= 0.85
