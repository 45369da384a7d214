"""The examples of one split, as far as a recipe's tasks need them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemini.model.data import Drawings, Review, load_drawings, load_sentiment, load_stories, load_texts


@dataclass(frozen=True)
class Corpus:
    """Drawings with names, labelled reviews, stories, other texts; any of them may be empty.

    ``names`` are the English names of the training split in order, the classes that drawings can have.
    """

    drawings: Drawings
    reviews: Sequence[Review] = ()
    stories: Sequence[str] = ()
    texts: Sequence[str] = ()
    names: Sequence[str] = ()

    def all_texts(self) -> list[str]:
        """Everything to train a tokenizer on."""
        names = [*self.drawings.en, *self.drawings.zh]
        return [*self.stories, *self.texts, *(review.text for review in self.reviews), *names]


NO_DRAWINGS = Drawings(np.empty((0, 64, 64, 4), np.uint8), (), (), (), ())


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
        names=sorted(set(load_drawings(cache, "train").en)) if "name" in tasks else (),
    )
