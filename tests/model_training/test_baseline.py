"""The linear baseline learns what words tell, and nothing from words that tell nothing."""

import numpy as np
import pytest

from gemini.model.data import Review
from gemini.model.training.baseline import baseline_accuracy

WORDS = {"en": (["bad", "poor", "sad"], ["good", "fine", "glad"]), "zh": (["差", "坏"], ["好", "棒"])}


def reviews(language: str, split: str, seed: int, *, told: bool) -> list[Review]:
    """Forty reviews whose words depend on the label, or not."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(40):
        words = WORDS[language][index % 2 if told else 0]
        text = (" " if language == "en" else "").join(generator.choice(words, 6))
        rows.append(Review(text, index % 2, language, split))
    return rows


@pytest.mark.parametrize("language", ["en", "zh"])
def test_words_that_tell_the_label_are_found(language: str) -> None:
    train, test = (reviews(language, split, seed, told=True) for seed, split in enumerate(("train", "test")))
    assert baseline_accuracy(train, test, language) == 100.0


def test_reviews_of_the_other_language_are_left_out() -> None:
    train = reviews("en", "train", 0, told=True) + reviews("zh", "train", 0, told=False)
    test = reviews("en", "test", 1, told=True) + reviews("zh", "test", 1, told=False)
    assert baseline_accuracy(train, test, "en") == 100.0
    assert baseline_accuracy(train, test, "zh") <= 75.0
