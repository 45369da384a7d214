"""The model card of a run: what it learnt from, how long, what it can do, what it cannot, unedited samples.

    python -m gemini.model.training.card RUN CACHE > README.md

Every figure comes from the run's training.json and the cache's sources.json; the sentences around them are in
card.md beside this file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

_SHOWN = 20
_FIGURES = {  # as `gemini.model.training.judge` calls them, and what they are
    "name_accuracy": "drawings of another hand: the right one of all names, %",
    "caption_en_exact": "captions of another hand, English: exact, %",
    "caption_en_chrf": "captions of another hand, English: chrF",
    "caption_zh_exact": "captions of another hand, Chinese: exact, %",
    "caption_zh_chrf": "captions of another hand, Chinese: chrF",
    "unseen_caption_en_chrf": "drawings whose names were never seen, English: chrF",
    "unseen_caption_zh_chrf": "drawings whose names were never seen, Chinese: chrF",
    "sentiment_en": "sentiment, English: accuracy, %",
    "sentiment_zh": "sentiment, Chinese: accuracy, %",
    "perplexity": "held-out stories: perplexity a token",
}


def model_card(folder: Path, cache: Path) -> str:
    """The card in Markdown, of a finished run in ``folder`` that learnt from ``cache``."""
    summary = _read(folder / "training.json")
    sources = _read(cache / "sources.json")
    recipe = summary["recipe"]
    packages = [
        (f"{item['name']} {item['version']}", item["licence"], item["use"])
        for item in sources.get("packages", [])
    ]
    if "python" in sources:
        python = sources["python"]
        packages.append((f"Python {python['version']}", python["licence"], python["use"]))
    stages = list(_stages(folder, summary))
    samples = summary["samples"]
    stories = samples.get("stories", [])
    return Template(files("gemini.model.training").joinpath("card.md").read_text("utf-8")).substitute(
        title=f"gemini-{recipe['size']}",
        parameters=f"{summary['parameters'] / 1e6:.1f} million",
        recipe=recipe["name"],
        fusion=recipe["fusion"],
        minutes=f"{sum(stage['minutes'] for _, stage in stages):.0f}",
        threads="1 thread" if summary["threads"] == 1 else f"{summary['threads']} threads",
        torch=summary["torch"],
        stages=_table(
            ("stage", "steps", "minutes", "parameters"),
            (
                (name, stage["steps"], f"{stage['minutes']:.1f}", f"{stage['parameters'] / 1e6:.1f} M")
                for name, stage in stages
            ),
        ),
        packages=_table(("package", "licence", "used for"), packages),
        figures=_table(("on the test split", "figure"), _figures(summary["test"])),
        bias=_bias(samples.get("bias")),
        loops=f"{samples.get('loops', 0)} of {len(stories)}",
        samples="\n\n".join(f"{number}. {story}" for number, story in enumerate(stories[:_SHOWN], 1))
        or "None.",
    )


def _stages(folder: Path, summary: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """The runs that led to this one, earliest first, and this one."""
    recipe = summary["recipe"]
    # The folder is called as the recipe calls itself, which need not be how it was named.
    path = folder / Path(recipe.get("start") or recipe.get("first", "")).name / "training.json"
    if recipe.get("first") and path.is_file():
        yield from _stages(path.parent, _read(path))
    yield summary["recipe"]["name"], summary


def _figures(test: Mapping[str, float]) -> Iterable[tuple[str, str]]:
    for name, meaning in _FIGURES.items():
        if name in test:
            count = test.get(f"{name.removesuffix('_exact').removesuffix('_chrf')}_count")
            yield meaning + (f" ({count} examples)" if count else ""), f"{test[name]:.1f}"


def _bias(counts: Mapping[str, Any] | None) -> str:
    if not counts:
        return "No texts were counted."
    lines = [
        f"In {counts['texts']} stories there are {counts['male']} words for men and boys and "
        f"{counts['female']} for women and girls; {counts['led_by_male']} stories speak more of him and "
        f"{counts['led_by_female']} more of her."
    ]
    if counts["beside"]:
        rows = [(word, *pair) for word, pair in counts["beside"].items()]
        lines.append(_table(("word", "in a sentence about him", "about her"), rows))
    return "\n\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    print(model_card(*map(Path, sys.argv[1:3])), end="")
