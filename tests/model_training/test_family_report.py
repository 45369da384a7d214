"""The report on a trained Gemini: what it says of a bundle is what the bundle does."""

import dataclasses
import json

import pytest

from gemini import family_report
from gemini.facade import load_model
from gemini.model.data import load_sentiment
from gemini.model.training.loop import train
from gemini.pipeline import compress_model

STORIES = ["The bird saw a boat and went home.", "The lamp saw a cloud above the old river."]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, options, cache):
    folder = tmp_path_factory.mktemp("report") / "tiny"
    train(dataclasses.replace(options, steps=2), folder, cache)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "fp32"
    compress_model(str(checkpoint), folder, "fp32", progress=False)
    return folder


def test_an_exact_bundle_says_what_torch_says(checkpoint, bundle, cache, monkeypatch, capsys):
    monkeypatch.setattr(family_report, "load_stories", lambda *_: STORIES)
    monkeypatch.setattr(family_report, "TIMED", 2)
    family_report.main([str(checkpoint), str(cache), str(bundle)])
    torch_row, row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["name"] == "fp32" and row["same_captions"] == row["same_tokens"] == 100
    assert row["size_mb"] == sum(file.stat().st_size for file in bundle.iterdir()) / 1e6
    for name in ("caption_en_chrf", "sentiment_en", "sentiment_zh"):
        assert row[name] == torch_row[name]
    model, reviews = load_model(bundle), load_sentiment(cache, "test", "zh")
    found = [model.classify(review.text).label == "positive" for review in reviews]
    right = sum(label == review.label for label, review in zip(found, reviews, strict=True))
    assert row["sentiment_zh"] == pytest.approx(100 * right / len(reviews))


def test_other_answers_are_counted(cache, monkeypatch):
    monkeypatch.setattr(family_report, "load_stories", lambda *_: STORIES)
    examples = family_report.load_examples(cache)
    count = len(examples.images)
    captions = {language: list(names) for language, names in examples.names.items()}
    labels = {language: ["positive"] * len(reviews) for language, reviews in examples.reviews.items()}
    reference = family_report.Answers(captions, captions, labels, [[1, 2], [3, 4]])
    wrong = {**captions, "en": ["?", *captions["en"][1:]]}
    answers = dataclasses.replace(reference, captions=wrong, greedy=wrong, tokens=[[1, 2], [3, 5]])
    row = family_report.judge("other", answers, examples, reference)
    assert row.caption_en_exact == pytest.approx(100 * (count - 1) / count) and row.caption_zh_exact == 100
    assert row.same_captions == pytest.approx(100 * (2 * count - 1) / (2 * count)) and row.same_tokens == 50
    assert row.sentiment_en == row.sentiment_zh == 50
