"""Recovery of what compression lost: the text to learn from, where a run keeps its state, what is reported.

recovery = prepare_recovery(checkpoint, output, 30, None, None)
learned = recover_quantized(student, original, recovery, recipe)
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gemini.benchmarks.text import TextSource, shipped_text, spread
from gemini.compress.adapters import adapted
from gemini.compress.dense import dense_weights
from gemini.compress.distill import Distillation, distill
from gemini.compress.recipe import Recipe
from gemini.compress.recover import let_weights_learn, make_learnable, settle
from gemini.errors import UsageError
from gemini.model.checkpoint import Checkpoint, load_checkpoint
from gemini.samples import text_windows
from gemini.self_text import SEED, sampled_windows

ROWS, LENGTH = 64, 128  # of one sampling; longer rows cost more in attention and teach no more
MINUTES_A_SAMPLING = 8.0  # of the time given: sampling takes about one of them
MOST_SAMPLINGS, MOST_ROWS = 16, 8192
HELD_OUT = 16  # rows
CALIBRATION_ROWS = 256
# Where all weights of what was pruned may learn (benchmarks/LOG.md): the rate, and what weighs beside logits.
RATE, STATES = 1e-3, 1.0
LABELS = 0.3  # the text itself, where it is the user's: what the model wrote itself says nothing new


@dataclass(frozen=True)
class Lessons:
    """Token ids to learn from (N, S) and to judge by (M, S), what they are, and the minutes left to learn."""

    rows: NDArray[np.int64]
    held_out: NDArray[np.int64]
    described: dict[str, Any]
    minutes: float
    given: bool  # whether the text is the user's


@dataclass(frozen=True)
class Recovery:
    """A recovery for ``output``; ``teacher`` None: the model itself before compression. ``facts``: what a run
    that goes on must have in common. ``codes``: whether those of 4-bit weights learn beside scales."""

    output: Path
    lessons: Lessons
    teacher: nn.Module | None
    facts: dict[str, Any]
    codes: bool

    def calibration(self) -> tuple[list[NDArray[np.int64]], dict[str, Any]]:
        """Windows (1, S) of what there is to learn from, and what to report about them.

        More of them than a compression without recovery waits for: it is a small part of the minutes.
        """
        chosen = spread(list(self.lessons.rows), CALIBRATION_ROWS)
        tokens = sum(row.size for row in chosen)
        return [row[None] for row in chosen], {**self.lessons.described, "tokens": tokens}


def make_lessons(
    checkpoint: Checkpoint, text: TextSource | None, minutes: float, progress: bool = True
) -> Lessons:
    """Text to recover on: the user's, else what the unquantized model writes, the more the longer it takes,
    and as much of the built-in text.

    UsageError for a model that does not generate, impossible minutes, or a text that is too short.
    """
    if not 0 < minutes < math.inf:
        raise UsageError(f"--recover {minutes:g} is impossible.", "Give the minutes that it may take.")
    if checkpoint.family != "decoder" or checkpoint.tokenizer is None:
        raise UsageError(
            f"Recovery is for models that generate; the task of this one is {checkpoint.task}.",
            "Leave --recover out.",
        )
    start = time.perf_counter()
    if text is not None:
        windows = text_windows(checkpoint, text, MOST_ROWS, LENGTH)
        described = text.to_dict()
    else:
        count = min(MOST_SAMPLINGS, max(1, round(minutes / MINUTES_A_SAMPLING)))
        sampled = [
            window
            for seed in range(SEED, SEED + count)  # the first one is what calibration uses
            for window in sampled_windows(checkpoint, ROWS, LENGTH, seed=seed, progress=progress)
        ]
        shipped = shipped_text()
        beside = text_windows(checkpoint, shipped, len(sampled), LENGTH)
        # The last ones are held out: some of each.
        windows = [
            *sampled[len(beside) :],
            *(each for two in zip(sampled, beside, strict=False) for each in two),
        ]
        described = {
            "name": f"sampled from the model itself, and {shipped.name}",
            "seeds": [SEED, SEED + count - 1],
        }
    if len(windows) < 2 * HELD_OUT:
        raise UsageError(
            f"The text has {len(windows)} rows of {LENGTH} tokens, too few to recover on.",
            "Give a longer text, or leave --calibration out.",
        )
    rows, held_out = np.split(np.concatenate(windows), [-HELD_OUT])
    described |= {"tokens": rows.size, "held_out_tokens": held_out.size}
    left = max(minutes - (time.perf_counter() - start) / 60, 0.0)
    return Lessons(rows, held_out, described, left, text is not None)


def prepare_recovery(
    checkpoint: Checkpoint,
    output: Path,
    minutes: float,
    teacher: str | None,
    text: TextSource | None,
    progress: bool = True,
    codes: bool = True,
) -> Recovery:
    """Load the teacher, if it is another model, and make ready what there is to learn."""
    guide = load_checkpoint(teacher) if teacher else checkpoint
    tables = [each.model.get_input_embeddings().weight.shape[0] for each in (checkpoint, guide)]
    if tables[0] != tables[1]:
        raise UsageError(
            f"The teacher has {tables[1]:,} tokens, the model {tables[0]:,}.",
            "Give the model that this one was made of.",
        )
    lessons = make_lessons(guide, text, minutes, progress)
    facts = {
        "model": checkpoint.source["sha256"],
        "teacher": guide.source["sha256"],
        "text": lessons.described,
    }
    return Recovery(output, lessons, guide.model if teacher else None, facts, codes)


def recover_quantized(
    student: nn.Module, original: nn.Module, recovery: Recovery, recipe: Recipe, progress: bool = True
) -> dict[str, Any]:
    """Let a model quantized with ``recipe`` learn, in place; returns what to report.

    ``original``: the model before quantization.
    """
    kind = {**recipe.to_dict(), "codes": recovery.codes}
    make_learnable(student, recovery.codes)
    with dense_weights(student):  # the head, which stays as it is, is not unpacked at every step
        options = Distillation(recovery.lessons.minutes)
        report = _learn(student, recovery.teacher or original, recovery, kind, options, progress)
    settle(student)
    return report


def recover_pruned(
    student: nn.Module,
    teacher: nn.Module,
    recovery: Recovery,
    cuts: Mapping[str, Any],
    adapters: str | None = None,
    progress: bool = True,
    pairs: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Let a float model that was pruned with ``cuts`` learn, in place; returns what to report.

    All of its weights but token embedding and head, or with ``adapters`` "lora" or "qlora" what low-rank
    adapters add to them. Hidden states count beside logits: they have the teacher's width; so does the text
    itself where it is the user's, as that is what the model is for. ``pairs``: the teacher's layer whose
    states each layer should have, where some were left out.
    """
    kind = {**cuts, "adapters": adapters}
    lessons = recovery.lessons
    options = Distillation(lessons.minutes, states=STATES, labels=LABELS if lessons.given else 0.0)
    if adapters:
        with adapted(student, nf4=adapters == "qlora"):
            return _learn(student, teacher, recovery, kind, options, progress, pairs)
    let_weights_learn(student)
    options = replace(options, rate=RATE, bf16=True)
    report = _learn(student, teacher, recovery, kind, options, progress, pairs)
    student.requires_grad_(False)
    return report


def forget(output: Path) -> None:
    """Remove the states of runs for ``output``."""
    shutil.rmtree(_states(output), ignore_errors=True)


def _learn(
    student: nn.Module,
    teacher: nn.Module,
    recovery: Recovery,
    kind: Mapping[str, Any],
    options: Distillation,
    progress: bool,
    pairs: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Distill; a run of the same kind, text and models that was cut off goes on, others are forgotten."""
    lessons = recovery.lessons
    facts = json.dumps([recovery.facts, kind], sort_keys=True)
    folder = _states(recovery.output) / hashlib.sha256(facts.encode()).hexdigest()[:16]
    for other in folder.parent.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    found = distill(
        student,
        teacher,
        lessons.rows,
        lessons.held_out,
        options,
        pairs=pairs,
        folder=folder,
        show=progress,
    )
    return {**asdict(found), "text": lessons.described}


def _states(output: Path) -> Path:
    return output.with_name(f".{output.name}.recovery")
