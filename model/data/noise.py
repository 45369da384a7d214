"""Noise on texts, by words: dropping, swapping and misspelling some.

A word is what stands between spaces; a Chinese character is a word of its own. The randomness comes from the
generator given, so a seed says what a text becomes.
"""

import re

import numpy as np

_HAN = "\u3400-\u9fff"
_WORD = re.compile(rf"([{_HAN}]|[^\s{_HAN}]+)(\s*)")


def words_of(text: str) -> list[tuple[str, str]]:
    """The words of a text, each with the space behind it: joined, they are the text without leading space."""
    return [(word, space) for word, space in _WORD.findall(text)]


def is_han(word: str) -> bool:
    """Whether a word is a Chinese character."""
    return re.fullmatch(f"[{_HAN}]", word) is not None


def noise_text(text: str, generator: np.random.Generator, share: float = 0.1) -> str:
    """The text with about `share` of its words dropped, swapped with the one before, or misspelt."""
    words = words_of(text)
    changed = generator.random(len(words)) < share
    kinds = generator.integers(3, size=len(words))
    noisy: list[tuple[str, str]] = []
    for (word, space), change, kind in zip(words, changed, kinds, strict=True):
        if change and kind == 0 and len(words) > 1:
            continue
        if change and kind == 1 and noisy:
            before, gap = noisy.pop()
            noisy += [(word, gap), (before, space)]
        else:
            noisy.append((_misspelt(word, generator) if change and kind == 2 else word, space))
    return _joined(noisy or words[:1])


def _joined(words: list[tuple[str, str]]) -> str:
    return "".join(word + space for word, space in words).strip()


def _misspelt(word: str, generator: np.random.Generator) -> str:
    """A word with two neighbouring letters exchanged, or one lost, or one doubled."""
    if len(word) < 3:
        return word
    place = int(generator.integers(len(word) - 1))
    first, second = word[place], word[place + 1]
    changed = (second + first, second, first + first + second)[int(generator.integers(3))]
    return word[:place] + changed + word[place + 2 :]
