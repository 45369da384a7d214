"""Requests for short stories, and what is kept of the answers.

The stories that gemini-nano learns from are sampled from a larger language model (distillation by data: Eldan
and Li, TinyStories, arXiv:2305.07759). A request is a pure function of its seed: a corpus can be made again.
"""

from __future__ import annotations

import random
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class StoryRequest:
    """What to ask (``request``, a user's message) and how the answer begins (``opening``)."""

    request: str
    opening: str


def story_request(seed: int) -> StoryRequest:
    """The request number ``seed``: girls and boys are equally frequent, and so are people and animals."""
    draw, words = random.Random(seed), vocabulary()
    girl = draw.random() < 0.5
    filled = {
        "name": draw.choice(words["girls" if girl else "boys"]),
        "kind": draw.choice(words["animals"]) if draw.random() < 0.5 else ("girl" if girl else "boy"),
        **{slot: draw.choice(words[f"{slot}s"]) for slot in ("mood", "deed", "thing", "place", "turn")},
    }
    filled["who"] = "a {mood} {kind} named {name}".format(**filled)
    request, opening = (draw.choice(words[part]).format(**filled) for part in ("requests", "openings"))
    return StoryRequest(_with_article(request), _with_article(opening))


@cache
def vocabulary() -> dict[str, list[str]]:
    """The word lists and templates of storytelling.toml."""
    return tomllib.loads(files("gemini.model.data").joinpath("storytelling.toml").read_text("utf-8"))


def tidy_story(text: str, minimum_words: int = 30) -> str | None:
    """The part of a sampled story worth learning from, on one line: whole sentences before the first loop.

    A sentence loops when it repeats five words in a row that the story has had already. None when fewer than
    ``minimum_words`` are left.
    """
    line = re.sub(r"\s+", " ", text).strip()
    kept: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for sentence in re.findall(r".+?[.!?][\"”']?(?=\s|$)", line):
        words = re.findall(r"\w+", sentence.lower())
        runs = [tuple(words[i : i + 5]) for i in range(len(words) - 4)]
        if any(run in seen for run in runs) or len(set(runs)) < len(runs):
            break
        seen.update(runs)
        kept.append(sentence.strip())
    story = " ".join(kept)
    return story if len(story.split()) >= minimum_words else None


def _with_article(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
