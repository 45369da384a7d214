"""Distillation: a student learns to say what its teacher says, for so many minutes, and the best state stays.

    report = distill(student, teacher, rows, held_out, Distillation(minutes=30), folder=Path("state"))

Labels are optional: the text may be any, the model's own samples included. Every parameter of the student
that requires gradients learns; the rest, and the teacher, stay. A run that was cut off goes on from
``folder``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from gemini.compress.recover import divergence, learning_groups, state_distance
from gemini.errors import RecipeError
from gemini.model.training import state
from gemini.model.training.order import Order
from gemini.model.training.precision import bf16_where_native
from gemini.model.training.schedule import learning_rate_factor, progress

EVALUATIONS = 8  # over a whole run
_SAVE_EVERY = 2  # evaluations: where whole weights learn, a state is three times as large as they are
_BATCH = 4  # rows


@dataclass(frozen=True)
class Distillation:
    """How long and how fast.

    ``rate``: what a step of Adam changes at most, as a share of a tensor's root mean square; ``code_rate``
    the same of a code, in steps of the code. Beside the divergence of logits ``states`` weighs the distance
    of hidden states, and ``labels`` the cross-entropy of the text (Hinton et al., "Distilling the Knowledge
    in a Neural Network", arXiv:1503.02531, section 2), which says more than a teacher does where the text is
    of a kind that is to be learned. ``patience``: evaluations without a better one after which a run stops.
    ``steps`` ends it before its time. ``bf16``: steps multiply in bfloat16 where the processor does
    (evaluations do not): more steps in the same time, and some noise, for students that have lost much.
    """

    minutes: float
    rate: float = 4e-4
    code_rate: float = 0.005
    states: float = 0.0
    labels: float = 0.0
    patience: int = 3
    warmup: int = 10
    steps: int = 1_000_000
    seed: int = 0
    bf16: bool = False


@dataclass(frozen=True)
class DistillationReport:
    """``before`` and ``after``: divergence from the teacher on held-out text, nats a token; ``best_step``:
    the step whose weights stayed, 0 if none was better than before (by the divergence, and the weighed
    cross-entropy if labels count); ``trained``: parameters."""

    before: float
    after: float
    best_step: int
    steps: int
    minutes: float
    trained: int
    history: list[dict[str, Any]]


def distill(
    student: nn.Module,
    teacher: nn.Module,
    rows: NDArray[np.int64],
    held_out: NDArray[np.int64],
    options: Distillation,
    *,
    pairs: Sequence[int] | None = None,
    folder: Path | None = None,
    show: bool = True,
) -> DistillationReport:
    """Train what requires gradients in ``student``, in place, towards ``teacher``.

    Args:
        rows: token ids (N, S) to learn from; ``held_out``: others (M, S) to choose the best state by.
        pairs: the teacher's layer whose states each layer of the student should have (`state_distance`).
        folder: where the state of the run is kept; one that lies there is continued.

    Raises:
        RecipeError: the loss is not finite.
    """
    trained = {name: p.data for name, p in student.named_parameters() if p.requires_grad}
    groups = learning_groups(student, options.rate, options.code_rate)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    order = Order([rows.shape[1]] * len(rows), min(_BATCH, len(rows)), options.seed, "recover")
    done, best = state.Progress(), {name: tensor.clone() for name, tensor in trained.items()}
    saved = state.finished_states(folder) if folder else []
    if saved:
        done, parts = state.load_state(saved[-1])
        state.copy_tensors(trained, parts["model"])
        best = parts.get("best") or {name: tensor.clone() for name, tensor in trained.items()}
        state.restore_optimizer(student, optimizer, parts["optimizer"])
    else:
        _evaluate(student, teacher, held_out, options.labels, done)
    started = time.monotonic() - done.elapsed
    over = _over(done, options)
    with tqdm(total=100, desc="recover", unit="%", delay=2, leave=False, disable=not show) as bar:
        while over < 1 and done.stale < options.patience:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * learning_rate_factor(done.step, options.warmup, over)
            loss = _step(student, teacher, rows[order.indices(done.step)], options, pairs, optimizer)
            if not math.isfinite(loss):
                raise RecipeError(
                    f"Recovery fails: the loss at step {done.step} is {loss}.",
                    "Leave out --recover, or give other text with --calibration.",
                )
            done.step += 1
            done.elapsed = time.monotonic() - started
            before, over = over, _over(done, options)
            bar.set_postfix_str(
                f"step {done.step}, loss {loss:.4f}, held-out {done.history[-1]['held_out']:.4f}"
            )
            bar.update(round(100 * over) - bar.n)
            if int(over * EVALUATIONS) == int(before * EVALUATIONS):
                continue
            if _evaluate(student, teacher, held_out, options.labels, done):
                for name, tensor in trained.items():
                    best[name].copy_(tensor)
            done.elapsed = time.monotonic() - started
            if folder and (len(done.history) % _SAVE_EVERY == 0 or over >= 1):
                newest = {} if done.best_step == done.step else {"best": best}
                parts = {"model": trained, "optimizer": state.optimizer_tensors(student, optimizer)}
                state.save_state(folder, done, parts | newest)
    state.copy_tensors(trained, best)
    (after,) = [row["held_out"] for row in done.history if row["step"] == done.best_step]
    return DistillationReport(
        before=done.history[0]["held_out"],
        after=after,
        best_step=done.best_step,
        steps=done.step,
        minutes=round(done.elapsed / 60, 2),
        trained=sum(tensor.numel() for tensor in trained.values()),
        history=done.history,
    )


def _over(done: state.Progress, options: Distillation) -> float:
    """How much of the run is over, 0 to 1."""
    return progress(done.step, options.steps, done.elapsed, options.minutes) if options.minutes > 0 else 1.0


def _step(
    student: nn.Module,
    teacher: nn.Module,
    ids: NDArray[np.int64],
    options: Distillation,
    pairs: Sequence[int] | None,
    optimizer: torch.optim.Optimizer,
) -> float:
    """One step of the optimizer on a batch (B, S); returns the divergence before it."""
    states = options.states > 0
    batch = {"input_ids": torch.from_numpy(ids), "use_cache": False, "output_hidden_states": states}
    with bf16_where_native() if options.bf16 else contextlib.nullcontext():
        with torch.no_grad():
            known = teacher(**batch)
        found = student(**batch)
    loss = logits_loss = divergence(found.logits, known.logits)
    if states:
        distance = state_distance(found.hidden_states[1:], known.hidden_states[1:], pairs)
        loss = loss + options.states * distance
    if options.labels:
        loss = loss + options.labels * _cross_entropy(found.logits, batch["input_ids"])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return logits_loss.item()


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the tokens that follow, from logits (B, S, V) for ids (B, S)."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _evaluate(
    student: nn.Module, teacher: nn.Module, rows: NDArray[np.int64], labels: float, done: state.Progress
) -> bool:
    """Note in the history how far the student is on ``rows``; whether it is the best so far."""
    apart = entropy = 0.0
    with torch.no_grad():
        for batch in torch.from_numpy(rows).split(_BATCH):
            said, known = (model(batch, use_cache=False).logits for model in (student, teacher))
            apart += divergence(said, known).item() * len(batch) / len(rows)
            if labels:
                entropy += _cross_entropy(said, batch).item() * len(batch) / len(rows)
    row = {"step": done.step, "seconds": round(done.elapsed, 1), "held_out": apart}
    done.history.append({**row, "cross_entropy": entropy} if labels else row)
    found = apart + labels * entropy
    better = done.best is None or found < done.best
    if better:
        done.best, done.best_step, done.stale = found, done.step, 0
    else:
        done.stale += 1
    return better
