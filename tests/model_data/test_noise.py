"""Noise changes what it says and keeps the rest, in both languages."""

from collections import Counter

import numpy as np
import pytest

from gemini.model.data.noise import noise_text, words_of

ENGLISH = " ".join(f"word{chr(97 + i % 26)}{i}" for i in range(200))
CHINESE = "这本书很好看，我非常喜欢 iPhone 的屏幕" * 10


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, "one", "", "  two\n words "])
def test_words_join_to_the_text(text: str) -> None:
    assert "".join(word + space for word, space in words_of(text)) == text.lstrip()
    assert noise_text(text, random(), share=0.0) == text.strip()
    assert noise_text(text, random(3), share=0.4) == noise_text(text, random(3), share=0.4)


def test_something_is_always_left() -> None:
    assert all(noise_text("one two", random(seed), share=1.0) for seed in range(50))


def test_noise_drops_swaps_and_misspells() -> None:
    words = ENGLISH.split()
    noisy = noise_text(ENGLISH, random(), share=0.3).split()
    kept = [word for word in noisy if word in set(words)]
    assert len(noisy) < len(words) and len(kept) < len(noisy) and kept != sorted(kept, key=words.index)
    assert sum((Counter(words) & Counter(noisy)).values()) > 0.6 * len(words)
    # A misspelling moves, loses or doubles one letter.
    assert all(min(abs(len(word) - len(other)) for other in words) <= 1 for word in noisy)
