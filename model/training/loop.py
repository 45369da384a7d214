"""The loop: the same for every recipe.

    train(load_options("nano"), Path("out"), default_cache())

A step sums the gradients of one batch of each task, then makes one step of AdamW. Everything random in a step
follows from (seed, step), so a run that is killed and resumed ends with the weights of an unbroken one, given
the same number of threads.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemini.errors import RecipeError, UsageError
from gemini.model.data.redraw import ensure_redrawn
from gemini.model.training import state
from gemini.model.training.adversarial import adversarial_loss
from gemini.model.training.average import RunningAverage
from gemini.model.training.card import model_card
from gemini.model.training.corpus import Corpus, load_corpus
from gemini.model.training.judge import judge, judge_result
from gemini.model.training.log import Log
from gemini.model.training.lora import add_lora, merge_lora
from gemini.model.training.losses import loss_of, make_optimizer
from gemini.model.training.options import TrainingOptions, load_options
from gemini.model.training.order import step_seed
from gemini.model.training.precision import bf16_where_native
from gemini.model.training.schedule import learning_rate_factor, progress
from gemini.model.training.start import (
    freeze_tower,
    image_embedder,
    load_tokenizer,
    make_model,
    save_final,
)
from gemini.model.training.states import ENCODER, ensure_states
from gemini.model.training.tasks import Batch, Task, build_tasks
from gemini.model.training.teacher import ensure_labels


@dataclass
class Run:
    """The moving parts of one run."""

    options: TrainingOptions
    folder: Path
    tokenizer: Any
    model: Any
    wrapper: Any  # peft's, or None without LoRA
    optimizer: torch.optim.Optimizer
    average: RunningAverage
    tasks: list[Task]
    valid: Corpus
    valid_tasks: list[Task]
    progress: state.Progress
    log: Log


def train(
    options: TrainingOptions, folder: Path, cache: Path, *, resume: bool = False, show: bool = False
) -> dict[str, Any]:
    """Train, save a Hugging Face folder, judge it on the test split; returns what training.json says."""
    before = 0.0  # minutes
    if options.first and not options.start:
        before = options.minutes * options.first_share
        options = replace(options, minutes=options.minutes - before)
    options = _recorded_options(folder, options, resume)
    if options.first and not options.start:  # a resumed run has recorded what it started from
        options = _after_first(options, before, folder, cache, show)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are his
        run = _prepare(options, folder, cache, show)
        try:
            _steps(run)
            return _finish(run, cache)
        finally:
            run.log.close()


def _after_first(
    options: TrainingOptions, minutes: float, folder: Path, cache: Path, show: bool
) -> TrainingOptions:
    """The options that start from the result of the recipe before, which is trained or resumed if need be."""
    before = load_options(options.first)
    own = folder / before.name
    if not (own / "training.json").exists():
        shape = {**options.model, **before.model}
        before = replace(
            before,
            minutes=minutes,
            size=options.size,
            fusion=options.fusion,
            seed=options.seed,
            model=shape,
        )
        train(before, own, cache, resume=True, show=show)
    return replace(options, start=str(own))


def _recorded_options(folder: Path, options: TrainingOptions, resume: bool) -> TrainingOptions:
    """The options of the run to resume, with the limits asked for now; or the given ones for a new run."""
    path = folder / "options.json"
    if not path.exists():
        return options
    if not resume:
        raise UsageError(
            f"{folder} already holds a run.", "Continue it with --resume, or choose another folder."
        )
    recorded = TrainingOptions.from_dict(json.loads(path.read_text(encoding="utf-8")))
    return replace(recorded, steps=options.steps, minutes=options.minutes)


def _prepare(options: TrainingOptions, folder: Path, cache: Path, show: bool) -> Run:
    if "mimic" in options.tasks:
        ensure_states(cache, show=show)
    corpus, valid = load_corpus(cache, "train", options.tasks), load_corpus(cache, "valid", options.tasks)
    redraws = max(task.redraws for task in options.tasks.values())
    if redraws:
        corpus = replace(corpus, redrawn=ensure_redrawn(cache, "train", redraws, show=show))
    recorded = json.dumps(options.to_dict(), indent=2, ensure_ascii=False)
    state.write_atomically(folder / "options.json", recorded.encode())
    tokenizer = load_tokenizer(options, folder, cache)
    torch.manual_seed(options.seed)
    model = make_model(options, tokenizer, corpus)
    wrapper = None
    if options.lora_rank:
        heads = ("classifier",) if options.head != "generation" else ()
        wrapper = add_lora(model, options.lora_rank, options.lora_alpha, train_also=heads)
    if options.freeze_tower:
        freeze_tower(model)
    model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, options.weight_decay, options.encoder_rate)
    average = RunningAverage(model, options.ema_decay)
    done = state.Progress()
    saved = state.finished_states(folder / "state")
    if saved:
        done, parts = state.load_state(saved[-1])
        state.copy_tensors(state.model_tensors(model), parts["model"])
        state.copy_tensors(average.tensors, parts["average"])
        state.restore_optimizer(model, optimizer, parts["optimizer"])
    return Run(
        options=options,
        folder=folder,
        tokenizer=tokenizer,
        model=model,
        wrapper=wrapper,
        optimizer=optimizer,
        average=average,
        tasks=build_tasks(tokenizer, _with_teacher(options, cache, show), corpus, train=True),
        valid=valid,
        valid_tasks=build_tasks(tokenizer, options, valid, train=False),
        progress=done,
        log=Log(folder / "runs", options.steps, done.step, show=show),
    )


def _with_teacher(options: TrainingOptions, cache: Path, show: bool) -> TrainingOptions:
    """The options with the file of soft labels in place of the teacher's name."""
    tasks = {
        name: replace(task, teacher=str(ensure_labels(cache, show=show))) if task.teacher == ENCODER else task
        for name, task in options.tasks.items()
    }
    return replace(options, tasks=tasks)


def _steps(run: Run) -> None:
    """All steps that are left, with a checkpoint and an evaluation now and then."""
    options, done = run.options, run.progress
    started = time.monotonic() - done.elapsed
    while done.step < options.steps:
        over = progress(done.step, options.steps, done.elapsed, options.minutes)
        if over >= 1 or (options.patience and done.stale >= options.patience):
            break
        rate = options.learning_rate * learning_rate_factor(done.step, options.warmup, over)
        losses = train_step(run, done.step, rate)
        run.log.step(done.step, losses, rate)
        done.step += 1
        done.elapsed = time.monotonic() - started
        if done.step % options.evaluate_every == 0:
            _validate(run, losses)
            done.elapsed = time.monotonic() - started
        if done.step % options.save_every == 0:
            _save(run)


def train_step(run: Run, step: int, rate: float) -> dict[str, float]:
    """One step of AdamW on the summed gradients of the tasks; returns each task's loss."""
    run.model.train()
    if run.options.freeze_tower:
        image_embedder(run.model).tower.eval()  # else batch norm would go on learning
    torch.manual_seed(step_seed(run.options.seed, "dropout", step))
    losses = {}
    for task in run.tasks:
        if step % task.options.every:
            continue
        batch = task.batch(step // task.options.every)
        loss = _loss(run, task, batch)
        (task.options.weight * loss).backward()
        losses[task.name] = loss.item()
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.options.clip)
    if not norm.isfinite():
        raise RecipeError(f"The gradient at step {step} is not finite.", "Lower `learning_rate`.")
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.average.update(run.model, step)
    return losses


def _loss(run: Run, task: Task, batch: Batch) -> Tensor:
    """The loss of a batch; with FGM the mean of the clean loss and the one under attack."""
    compute = loss_of(run.options.head)

    def loss() -> Tensor:
        with bf16_where_native():
            return compute(run.model, batch, task.options.label_smoothing)

    if not task.options.adversarial:
        return loss()
    embedding = run.model.get_encoder().get_input_embeddings()
    clean, attacked = adversarial_loss(embedding, loss, task.options.adversarial)
    return (clean + attacked) / 2


def _validate(run: Run, losses: dict[str, float]) -> None:
    """Judge the averaged weights on the validation split and remember the best."""
    done = run.progress
    run.model.eval()
    with run.average.applied(run.model):
        figures = judge(
            [run.model],
            run.tokenizer,
            run.options,
            run.valid,
            run.valid_tasks,
            limit=run.options.evaluate_samples,
        )
    loss = sum(task.options.weight * figures[f"{task.name}_loss"] for task in run.valid_tasks)
    row = {"step": done.step, "seconds": round(done.elapsed, 1), "loss": loss, **figures}
    done.history.append(row | {f"train_{name}_loss": value for name, value in losses.items()})
    run.log.evaluation(done.step, {"loss": loss, **figures})
    if done.best is None or loss < done.best:
        done.best, done.best_step, done.stale = loss, done.step, 0
        if run.options.patience:
            state.write_tensors(run.folder / "state" / "best.safetensors", run.average.tensors)
    else:
        done.stale += 1


def _save(run: Run) -> None:
    state.save_state(
        run.folder / "state",
        run.progress,
        {
            "model": state.model_tensors(run.model),
            "average": run.average.tensors,
            "optimizer": state.optimizer_tensors(run.model, run.optimizer),
        },
    )


def _finish(run: Run, cache: Path) -> dict[str, Any]:
    """Save the averaged weights (after early stopping, the best ones) and judge them on the test split."""
    options, done = run.options, run.progress
    _save(run)
    best = run.folder / "state" / "best.safetensors"
    final = state.read_tensors(best) if best.exists() else run.average.tensors
    state.copy_tensors(state.model_tensors(run.model), final)
    run.model.eval()
    if run.wrapper is not None:
        run.model = merge_lora(run.wrapper)
    save_final(run.model, run.tokenizer, run.folder)
    run.log.say("judging the result on the test split")
    figures, samples = judge_result([run.model], run.tokenizer, options, cache)
    summary = {
        # The folder's name alone: the summary is published, and where this machine keeps things is not.
        "recipe": {**options.to_dict(), "start": Path(options.start).name},
        "steps": done.step,
        "minutes": round(done.elapsed / 60, 2),
        "best_step": done.best_step,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "test": figures,
        "samples": samples,
        "history": done.history,
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    state.write_atomically(run.folder / "training.json", text.encode())
    if options.head == "generation":
        state.write_atomically(run.folder / "README.md", model_card(run.folder, cache).encode())
    return summary
