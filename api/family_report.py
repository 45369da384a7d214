"""What bundles of a trained Gemini make of the test data, beside their checkpoint in torch.

    python -m gemini.family_report CHECKPOINT CACHE BUNDLE [BUNDLE ...] [--limit N]

The same pictures and prompts go to all: captions of drawings by another hand, labels of reviews, 60 greedy
tokens after the beginnings of held-out stories. ``--limit`` takes so many drawings and so many reviews of a
language, evenly spread. The last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from gemini.facade import Model, load_model
from gemini.model.data import Review, augment, load_drawings, load_sentiment, load_stories
from gemini.model.gemini import continue_prompt
from gemini.model.training import evaluate
from gemini.model.training.start import load_checkpoint
from gemini.model.training.tasks import encode
from gemini.runtime import Seq2SeqGenerator
from gemini.runtime.options import make_options

SAME_IMAGES, SAME_PROMPTS, SAME_TOKENS = 200, 20, 60
TIMED = 40


@dataclass(frozen=True)
class Row:
    """One model: how good, how large, how fast; percents, megabytes, milliseconds.

    ``same_captions`` (greedy) and ``same_tokens`` compare with torch; latencies are medians of single calls.
    """

    name: str
    caption_en_exact: float
    caption_en_chrf: float
    caption_zh_exact: float
    sentiment_en: float
    sentiment_zh: float
    size_mb: float | None = None
    same_captions: float | None = None
    same_tokens: float | None = None
    caption_ms: float | None = None
    load_ms: float | None = None


@dataclass(frozen=True)
class Examples:
    """What every model is asked."""

    images: list[NDArray[np.uint8]]  # (64, 64, 3), drawings on white
    names: dict[str, Sequence[str]]
    reviews: dict[str, list[Review]]
    prompts: list[str]


@dataclass(frozen=True)
class Answers:
    """What one model says."""

    captions: dict[str, list[str]]
    greedy: dict[str, list[str]]  # captions of the first SAME_IMAGES, without a search
    labels: dict[str, list[str]]
    tokens: list[list[int]]


def load_examples(cache: Path, limit: int | None = None) -> Examples:
    """The test split of the cache, at most ``limit`` drawings and reviews of a language."""
    drawings = load_drawings(cache, "test")
    chosen = evaluate.spread(len(drawings.en), limit)
    pixels = augment.on_white(torch.from_numpy(drawings.pixels[chosen]))
    rounded = ((pixels * 0.5 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    stories = load_stories(cache, "test")[:SAME_PROMPTS]
    return Examples(
        images=list(rounded),
        names={
            "en": [drawings.en[index] for index in chosen],
            "zh": [drawings.zh[index] for index in chosen],
        },
        reviews={
            language: [reviews[index] for index in evaluate.spread(len(reviews), limit)]
            for language in ("en", "zh")
            for reviews in [load_sentiment(cache, "test", language)]
        },
        prompts=[" ".join(story.split()[:6]) for story in stories],
    )


def ask_torch(folder: Path, examples: Examples) -> Answers:
    """The checkpoint itself: captions with beams, the rest greedy."""
    model, tokenizer = load_checkpoint(folder)
    pixels = torch.from_numpy(np.stack(examples.images)).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - 0.5) / 0.5
    labels = {}
    for language, reviews in examples.reviews.items():
        shares = evaluate.label_probabilities(model, tokenizer, [review.text for review in reviews])
        labels[language] = ["positive" if share > 0.5 else "negative" for share in shares[:, 1].tolist()]
    tokens = []
    for prompt in examples.prompts:
        ids = torch.tensor(encode(tokenizer, [continue_prompt(prompt)]))
        with torch.inference_mode():
            made = model.generate(input_ids=ids, max_new_tokens=SAME_TOKENS, do_sample=False)
        tokens.append(made[0, 1:].tolist())
    captions = {
        language: evaluate.captions(model, tokenizer, pixels, language) for language in examples.names
    }
    greedy = {
        language: evaluate.captions(model, tokenizer, pixels[:SAME_IMAGES], language, beams=1)
        for language in examples.names
    }
    return Answers(captions, greedy, labels, tokens)


def ask_bundle(model: Model, examples: Examples) -> Answers:
    """A bundle, one request at a time."""
    session = model.session
    assert isinstance(session, Seq2SeqGenerator)
    captions: dict[str, list[str]] = {}
    greedy: dict[str, list[str]] = {}
    labels: dict[str, list[str]] = {}
    for language in examples.names:
        captions[language] = [
            model.generate_caption(image, language, max_length=24).strip()
            for image in tqdm(examples.images, desc=f"captions {language}", leave=False, delay=2)
        ]
        greedy[language] = [
            model.generate_caption(image, language, max_length=24, num_beams=1).strip()
            for image in examples.images[:SAME_IMAGES]
        ]
    for language, reviews in examples.reviews.items():
        labels[language] = [
            model.classify(review.text).label
            for review in tqdm(reviews, desc=f"reviews {language}", leave=False, delay=2)
        ]
    sources = [session.tokenizer.encode(session.prefixed(prompt)) for prompt in examples.prompts]
    options = make_options(session.bundle.manifest.generation.defaults, {"max_new_tokens": SAME_TOKENS})
    return Answers(captions, greedy, labels, session.generate_ids(sources, options=options))


def judge(name: str, answers: Answers, examples: Examples, reference: Answers | None = None) -> Row:
    """The figures of some answers."""
    scores = {
        language: evaluate.caption_scores(found, list(examples.names[language]))
        for language, found in answers.captions.items()
    }
    right = {
        language: np.mean(
            [("negative", "positive")[r.label] == label for r, label in zip(reviews, labels, strict=True)]
        )
        for (language, reviews), labels in zip(examples.reviews.items(), answers.labels.values(), strict=True)
    }
    row = Row(
        name,
        scores["en"]["exact"],
        scores["en"]["chrf"],
        scores["zh"]["exact"],
        100 * float(right["en"]),
        100 * float(right["zh"]),
    )
    if reference is None:
        return row
    pairs = [
        (found, expected)
        for language, own in answers.greedy.items()
        for found, expected in zip(own, reference.greedy[language], strict=True)
    ]
    same_tokens = [a == b for a, b in zip(answers.tokens, reference.tokens, strict=True)]
    return replace(
        row,
        same_captions=100 * float(np.mean([a == b for a, b in pairs])),
        same_tokens=100 * float(np.mean(same_tokens)),
    )


def time_bundle(folder: Path, image: NDArray[np.uint8]) -> tuple[float, float]:
    """(loading, captioning) in milliseconds, on two threads."""
    started = time.perf_counter()
    model = load_model(folder, threads=2)
    loaded = time.perf_counter()
    spent = []
    for _ in range(TIMED):
        before = time.perf_counter()
        model.generate_caption(image)
        spent.append(time.perf_counter() - before)
    return 1e3 * (loaded - started), 1e3 * median(spent)


def report(checkpoint: Path, cache: Path, bundles: Sequence[Path], limit: int | None = None) -> list[Row]:
    """The checkpoint first, then each bundle."""
    examples = load_examples(cache, limit)
    reference = ask_torch(checkpoint, examples)
    rows = [judge("torch fp32", reference, examples)]
    for folder in bundles:
        load_ms, caption_ms = time_bundle(folder, examples.images[0])
        row = judge(folder.name, ask_bundle(load_model(folder), examples), examples, reference)
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        rows.append(replace(row, size_mb=size, caption_ms=caption_ms, load_ms=load_ms))
    return rows


def main(arguments: Sequence[str]) -> None:
    """Print a table, and the rows as JSON."""
    from gemini.model.offline import import_transformers

    import_transformers()
    parser = argparse.ArgumentParser(prog="python -m gemini.family_report")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--limit", type=int)
    given = parser.parse_args(arguments)
    rows = [asdict(row) for row in report(given.checkpoint, given.cache, given.bundles, given.limit)]
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        cells = (
            "" if value is None else f"{value:.1f}" if isinstance(value, float) else value
            for value in row.values()
        )
        print("| " + " | ".join(cells) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
