"""Reviews without duplicates across splits, paragraphs of prose, stories that are fit to learn from."""

import json
from pathlib import Path

import pytest

from gemini.errors import DataError
from gemini.model.data.splits import fraction, normalized, split_of
from gemini.model.data.texts import build_sentiment, build_texts, read_stories

STORY = (
    "Once upon a time there was a little cat named Mia. She lived in a warm house by the sea. One day she "
    "found a red ball in the garden and brought it to her friend Tom. They played until evening of day {}."
)


def fixture(*rows: tuple[str, int | None]) -> bytes:
    return json.dumps([{"text": text, "class": label} for text, label in rows]).encode()


def test_texts_that_differ_in_case_space_and_punctuation_are_one() -> None:
    assert normalized("  Very GOOD, really!\t") == normalized("very good really") == "verygoodreally"
    assert normalized("很好，ＡＢ！") == "很好ab"
    english = [
        fixture(("Very good!", 1), ("very  GOOD", 1), ("So bad", 0)),
        fixture(("Very good", 1), ("", None)),
    ]
    found = build_sentiment(english, "真好。\n真好\n\n好吃\r\n".encode(), "难吃\n好吃！\n".encode())
    assert [(review.text, review.label, review.language) for review in found] == [
        ("Very good!", 1, "en"),
        ("So bad", 0, "en"),
        ("真好。", 1, "zh"),
        ("难吃", 0, "zh"),
    ]


def test_splits_have_their_shares_and_follow_the_words_alone() -> None:
    places = [split_of(f"text {i}", 0.1, 0.2) for i in range(10_000)]
    # 4 standard deviations of a binomial.
    assert abs(places.count("test") - 2000) < 160 and abs(places.count("valid") - 1000) < 120
    assert all(split_of(f"TEXT, {i}!", 0.1, 0.2) == places[i] for i in range(100))
    assert fraction("a", "x") != fraction("a", "y") and 0 <= fraction("a") < 1


def test_paragraphs_are_prose_and_there_once() -> None:
    found = build_texts()
    texts = [paragraph.text for paragraph in found]
    assert len(found) > 500 and len(set(texts)) == len(texts) and build_texts() == found
    assert not any(">>>" in text or "\n" in text for text in texts)


def test_stories_are_filtered_and_there_once(tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    stories = [STORY.format(i) for i in range(200)]
    refused = [None, "Too short.", STORY.format(1).upper(), STORY.format(1).replace("ball", "gun")]
    lines = [json.dumps({"text": text, "prompt": "p", "seed": 0}) for text in [*stories, *refused]]
    path.write_text("\n".join(lines) + "\n" + lines[0][:20])
    found = list(read_stories(path))
    assert [text for _, text in found] == stories
    assert {split for split, _ in found} == {"train", "valid", "test"}


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "p"}', '{"text": 3}', "null"])
def test_a_line_that_is_no_story_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "stories.jsonl"
    path.write_text(json.dumps({"text": STORY}) + f"\n{line}\n")
    with pytest.raises(DataError, match="Line 2"):
        list(read_stories(path))


def test_missing_stories_say_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gemini-edge stories"):
        list(read_stories(tmp_path / "stories.jsonl"))
