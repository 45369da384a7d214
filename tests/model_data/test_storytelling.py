"""Requests for stories are reproducible and balanced; what is kept of an answer has no loop."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from gemini.model.data.storytelling import story_request, tidy_story, vocabulary


def test_a_request_is_a_function_of_its_seed() -> None:
    assert story_request(7) == story_request(7)
    assert len({story_request(seed) for seed in range(500)}) > 490


def test_girls_and_boys_are_equally_frequent() -> None:
    girls, boys = vocabulary()["girls"], vocabulary()["boys"]
    names = Counter(
        re.search("|".join([*girls, *boys]), story_request(seed).opening)[0] for seed in range(4000)
    )
    # 4000 fair draws stay within 4 standard deviations (126) of the middle.
    assert abs(sum(names[girl] for girl in girls) - 2000) < 126 and sum(names.values()) == 4000


def test_no_placeholder_and_no_wrong_article_is_left() -> None:
    for seed in range(1000):
        text = f"{story_request(seed).request} {story_request(seed).opening}"
        assert "{" not in text and not re.search(r"\b[Aa] [aeiou]", text), text


def test_a_story_ends_before_its_first_repetition() -> None:
    text = "The cat had a big red hat.  It ran\nhome. Then the cat had a big red hat again. The end."
    assert tidy_story(text, minimum_words=1) == "The cat had a big red hat. It ran home."


def test_an_unfinished_sentence_is_dropped() -> None:
    assert tidy_story('He said, "Come in!" She came in. And then they', minimum_words=1) == (
        'He said, "Come in!" She came in.'
    )


@pytest.mark.parametrize(
    "text", ["", "Too short.", "no end " * 40, "He ran and ran and ran and ran and ran on. " * 9]
)
def test_nothing_is_kept_of_a_useless_answer(text: str) -> None:
    assert tidy_story(text) is None
