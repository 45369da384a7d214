"""The filters name a reason, spare harmless words, and the counts are those of a reader."""

import pytest

from gemini.model.data.bias import count_bias, is_harmful, quality_filter, refusal

STORY = (
    "Once upon a time there was a little cat named Mia. She lived in a warm house by the sea. One day she "
    "found a red ball in the garden and brought it to her friend Tom. They played until the sun went down."
)


def test_a_good_story_is_kept() -> None:
    assert refusal(STORY) is None and quality_filter(STORY)


@pytest.mark.parametrize(
    ("story", "reason"),
    [
        ("The cat ran.", "length"),
        (STORY * 12, "length"),
        (STORY + " 小猫回家了。", "language"),
        (STORY + " 1 2 3 4 5 6 7 8 9 " * 8 + ".", "language"),
        (STORY + " Then she", "unfinished"),
        (STORY + " Here's a short story about a dog.", "assistant"),
        (STORY + " #cats.", "assistant"),
        (STORY + " He ran and ran and ran and ran and ran and ran and ran.", "repetition"),
        (STORY + " " + "Again she ran home. Then home she ran. " * 20, "repetition"),
        (STORY + " Then he killed the fish.", "harm"),
    ],
)
def test_a_poor_story_is_refused_with_its_reason(story: str, reason: str) -> None:
    assert refusal(story) == reason and not quality_filter(story)


@pytest.mark.parametrize(
    "text", ["kills", "Stabbed!", "the hater", "dying", "two knives", "bitches", "drunken"]
)
def test_inflections_are_refused(text: str) -> None:
    assert is_harmful(text)


@pytest.mark.parametrize(
    "text",
    ["Diego", "the warmest bulletin", "a skill", "wardrobe", "diet", "a shooting star", "gravel", "begun"],
)
def test_words_that_only_begin_alike_are_kept(text: str) -> None:
    assert not is_harmful(text)


def test_counts_are_by_text_and_by_sentence() -> None:
    counts = count_bias(
        [
            "He is a doctor. She is a brave nurse. She met the doctor.",  # 1 against 2
            "The boy and his mother saw a teacher. Dad laughed.",  # 3 against 1, the teacher beside both
            "The sea is blue.",
        ]
    )
    assert (counts.texts, counts.male, counts.female) == (3, 4, 3)
    assert (counts.led_by_male, counts.led_by_female) == (1, 1)
    assert counts.beside == {"brave": (0, 1), "doctor": (1, 1), "nurse": (0, 1)}
    assert counts.female_share == pytest.approx(3 / 7, abs=1e-12) and count_bias([]).female_share == 0.5
