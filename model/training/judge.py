"""Which figures a recipe's tasks are judged by; several checkpoints vote on sentiment.

python -m gemini.model.training.judge CACHE CHECKPOINT [CHECKPOINT ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gemini.model.data.bias import count_bias
from gemini.model.training import evaluate
from gemini.model.training.corpus import Corpus, load_corpus
from gemini.model.training.losses import loss_of
from gemini.model.training.options import TrainingOptions
from gemini.model.training.tasks import Task, build_tasks

VALIDATION_BATCHES = 8
STORIES = 100  # that are written and counted
Figures = dict[str, float]


def judge(
    models: Sequence[Any],
    tokenizer: Any,
    options: TrainingOptions,
    corpus: Corpus,
    tasks: Sequence[Task],
    *,
    batches: int = VALIDATION_BATCHES,
    limit: int | None = None,
) -> Figures:
    """The figures of each task on a held-out split: its loss, and what the task is for.

    Captions, losses and stories are the first model's; on sentiment all models vote.
    """
    compute = loss_of(options.head)
    figures: Figures = {}
    for task in tasks:
        loss = evaluate.mean_loss(models[0], task, compute, batches=batches)
        figures[f"{task.name}_loss"] = loss
        if task.name == "caption":
            figures |= evaluate.judge_captions(models[0], tokenizer, corpus.drawings, limit=limit)
        elif task.name == "classify":
            figures |= evaluate.judge_sentiment(models, tokenizer, corpus.reviews, limit=limit)
        elif task.name == "name":
            figures["name_accuracy"] = evaluate.name_accuracy(models[0], task)
        elif task.name == "continue":
            figures["perplexity"] = evaluate.perplexity(loss)
    return figures


def judge_result(
    models: Sequence[Any], tokenizer: Any, options: TrainingOptions, cache: Path
) -> tuple[Figures, dict[str, Any]]:
    """Figures on the whole test split, and stories that the model wrote with what is noticed in them."""
    corpus = load_corpus(cache, "test", options.tasks)
    tasks = build_tasks(tokenizer, options, corpus, train=False)
    figures = judge(models, tokenizer, options, corpus, tasks, batches=10**9)
    if "caption" in options.tasks:
        unseen = load_corpus(cache, "unseen", ["caption"]).drawings
        scores = evaluate.judge_captions(models[0], tokenizer, unseen)
        figures |= {f"unseen_{name}": value for name, value in scores.items()}
    if "continue" not in options.tasks or not corpus.stories:
        return figures, {}
    prompts = [" ".join(story.split()[:6]) for story in corpus.stories[:STORIES]]
    stories = evaluate.continuations(models[0], tokenizer, prompts)
    loops = sum(map(evaluate.has_loop, stories))
    return figures, {"stories": stories, "loops": loops, "bias": asdict(count_bias(stories))}


def main(arguments: Sequence[str]) -> None:
    """Judge finished runs; their recipes must have the same tasks."""
    from gemini.model.offline import import_transformers

    import_transformers()
    from gemini.model.training.start import load_checkpoint

    cache, *folders = map(Path, arguments)
    loaded = [load_checkpoint(folder) for folder in folders]
    table = json.loads((folders[0] / "options.json").read_text(encoding="utf-8"))
    options = replace(TrainingOptions.from_dict(table), start="")
    figures, samples = judge_result([model for model, _ in loaded], loaded[0][1], options, cache)
    print(json.dumps({"test": figures, "samples": samples}, ensure_ascii=False))


if __name__ == "__main__":
    main(sys.argv[1:])
