"""The examples of one split, as far as a recipe's tasks need them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemini.model.data import (
    Drawings,
    Review,
    drawing_names,
    load_drawings,
    load_sentiment,
    load_stories,
    load_texts,
)
from gemini.model.training.states import read_states, states_path

NO_STATES = np.empty((0, 0), np.float16)


@dataclass(frozen=True)
class Corpus:
    """Drawings with names, labelled reviews, stories, other texts; any of them may be empty.

    ``names`` are the English names of the training split in order, the classes that drawings can have and the
    order of prototypes.
    ``redrawn`` are the drawings by invented hands, (N, count, 64, 64, 4) uint8. ``thoughts`` are texts and
    the states that a sentence encoder has for them, (N, D) float16.
    """

    drawings: Drawings
    redrawn: NDArray[np.uint8] | None = None
    reviews: Sequence[Review] = ()
    stories: Sequence[str] = ()
    texts: Sequence[str] = ()
    names: Sequence[str] = ()
    thoughts: tuple[Sequence[str], NDArray[np.float16]] = ((), NO_STATES)


NO_DRAWINGS = Drawings(np.empty((0, 64, 64, 4), np.uint8), (), (), (), ())


def all_texts(cache: Path) -> list[str]:
    """Everything to train a tokenizer on: stories, other texts, reviews and names of the training split."""
    corpus = load_corpus(cache, "train", ["continue", "denoise", "classify"])
    names = drawing_names(cache, "train")
    return [
        *corpus.stories,
        *corpus.texts,
        *(review.text for review in corpus.reviews),
        *(en for en, _ in names),
        *(zh for _, zh in names),
    ]


def load_corpus(cache: Path, split: str, tasks: Collection[str]) -> Corpus:
    """What the named tasks read in "train", "valid", "test" or, drawings only, "unseen".

    Stories are optional, because sampling them takes hours: without them prose is the other texts alone.
    """
    prose = bool({"continue", "denoise"} & set(tasks))
    stories = prose and (cache / "stories.jsonl").is_file()
    return Corpus(
        drawings=load_drawings(cache, split) if {"caption", "name"} & set(tasks) else NO_DRAWINGS,
        reviews=load_sentiment(cache, split) if {"classify", "denoise"} & set(tasks) else (),
        stories=load_stories(cache, split) if stories else (),
        texts=load_texts(cache, split) if prose else (),
        names=sorted({en for en, _ in drawing_names(cache, "train")})
        if {"caption", "name"} & set(tasks)
        else (),
        thoughts=read_states(states_path(cache), split) if "mimic" in tasks else ((), NO_STATES),
    )
