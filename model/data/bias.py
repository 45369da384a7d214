"""What a story must not hold, what makes it poor, and how often it speaks of whom.

A word list sees words and no meaning: it lets through harm that is told in harmless words and refuses some
harmless texts. For children's stories that is the cheaper mistake.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files

_WORDS = tomllib.loads(files("gemini.model.data").joinpath("bias.toml").read_text("utf-8"))
_MALE, _FEMALE = frozenset(_WORDS["male"]), frozenset(_WORDS["female"])
_COUNTED = frozenset(_WORDS["occupations"] + _WORDS["traits"])
# What a model says when it speaks as an assistant, and markup.
_ASSISTANT = re.compile(
    r"as an ai\b|\blanguage model|\bi(?:'m sorry, but i)? (?:cannot|can't) (?:fulfil|help with|assist|write)|"
    r"\bhere(?:'s| is) (?:a|the|your) (?:\w+ )*(?:story|poem|paragraph)|\bprompt\b|http|@|\*\*|```|#|<\|"
)
_LATIN = re.compile(r"[A-Za-z]")


def quality_filter(story: str) -> bool:
    """Whether a story is fit to learn from; `refusal` says why not."""
    return refusal(story) is None


def refusal(story: str) -> str | None:
    """The reason why a story is not fit to learn from, None when it is.

    The reasons: "length", "language", "unfinished", "assistant" (the model speaks of itself or in markup),
    "repetition" (four words in a row three times, or too few different words), "harm".
    """
    words = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)?", story.lower())
    if not 30 <= len(words) <= 400:
        return "length"
    letters = sum(character.isalpha() for character in story)
    if len(_LATIN.findall(story)) < 0.99 * letters or letters < 0.7 * len(story):
        return "language"
    if story.rstrip()[-1] not in ".!?\"”'’":
        return "unfinished"
    if _ASSISTANT.search(story.lower()):
        return "assistant"
    runs = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    if max(runs.values()) >= 3 or len(set(words)) < 0.35 * min(len(words), 150):
        return "repetition"
    return "harm" if is_harmful(story) else None


def is_harmful(text: str) -> bool:
    """Whether a text holds a word of violence, drugs, sexuality or hatred."""
    lowered = text.lower()
    for phrase in _WORDS["harmless"]:
        lowered = lowered.replace(phrase, "")
    return _HARM.search(lowered) is not None


def _inflected(word: str) -> str:
    """A pattern for a word and its regular forms: "stab", "stabs", "stabbed"; "hate", "hater", "hating"."""
    if word.endswith("e"):
        return f"{word[:-1]}(?:e|es|ed|ers?|ing)"
    plural = "es" if word.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{word}(?:{plural}|{word[-1]}?(?:ed|ers?|ing))?"


_HARM = re.compile(rf"\b(?:{'|'.join(map(_inflected, _WORDS['harmful']))})\b")


@dataclass(frozen=True)
class BiasCounts:
    """How often texts speak of whom.

    Attributes:
        texts: how many were counted.
        male: words for men and boys ("he", "brother").
        female: words for women and girls.
        led_by_male: texts with more words for men than for women.
        led_by_female: the opposite; the other texts are even.
        beside: occupation or trait -> (sentences in which it stands with words for men only, for women only).
    """

    texts: int
    male: int
    female: int
    led_by_male: int
    led_by_female: int
    beside: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def female_share(self) -> float:
        """Words for women among words for women or men; 0.5 is even, and so is a corpus with none."""
        total = self.male + self.female
        return self.female / total if total else 0.5


def count_bias(texts: Iterable[str]) -> BiasCounts:
    """Count the words for men and women in English texts, and what stands in the same sentence with them."""
    total = male = female = led_by_male = led_by_female = 0
    beside: dict[str, list[int]] = {}
    for text in texts:
        men = women = 0
        for sentence in re.split(r"[.!?]+", text.lower()):
            words = re.findall(r"[a-z]+", sentence)
            here_men = sum(word in _MALE for word in words)
            here_women = sum(word in _FEMALE for word in words)
            men, women = men + here_men, women + here_women
            if (here_men > 0) != (here_women > 0):
                for word in _COUNTED.intersection(words):
                    beside.setdefault(word, [0, 0])[here_women > 0] += 1
        total += 1
        male, female = male + men, female + women
        led_by_male += men > women
        led_by_female += women > men
    pairs = {word: (counts[0], counts[1]) for word, counts in sorted(beside.items())}
    return BiasCounts(total, male, female, led_by_male, led_by_female, pairs)
