"""One trial of a search: a recipe on a share of pruning, made by the pipeline, stored as a bundle.

What a trial found is the report in its bundle: one that lies there complete is never made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gemini.benchmarks.metrics import loss_percent
from gemini.compress.recipe import load_recipe
from gemini.errors import BundleError, GeminiEdgeError, RecipeError
from gemini.pipeline import compress_model
from gemini.pruning import prune_checkpoint
from gemini.runtime.bundle import read_bundle

MILDER = ("fp32", "int8", "int4-gptq", "int4-fast", "int4")  # each loses more than the one before
_FAR = 2.0  # a loss of so many times what is allowed makes what is harsher hopeless


@dataclass(frozen=True)
class Trial:
    """A recipe, as ``load_recipe`` takes it, on a checkpoint without the share ``ratio`` of its units, or of
    its experts."""

    recipe: str
    ratio: float

    @property
    def name(self) -> str:
        return load_recipe(self.recipe).name + (f", {100 * self.ratio:g} % pruned" if self.ratio else "")


@dataclass(frozen=True)
class Search:
    """What all trials share. Plain values, so that it can travel to other processes and machines.

    digest: over checkpoint, texts and versions, all that a result depends on beside its trial; deadline: in
    seconds since the epoch, after which no trial starts.
    """

    source: str
    name: str
    task: str
    eval_text: str | None
    calibration: str | None
    max_drop: float | None
    folder: Path
    digest: str
    deadline: float
    trials: tuple[Trial, ...]

    def bundle(self, trial: Trial) -> Path:
        """Where the bundle of a trial lies, with its report."""
        recipe = load_recipe(trial.recipe).to_dict()
        key = hashlib.sha256(json.dumps([self.digest, recipe, trial.ratio]).encode()).hexdigest()[:12]
        return self.folder / "trials" / f"{recipe['name']}-{trial.ratio:g}-{key}"

    def pruned(self, ratio: float) -> Path:
        """Where the checkpoint without that share of its units lies."""
        return self.folder / "pruned" / self.digest[:12] / f"{self.name}-pruned-{100 * ratio:g}"


def run_trial(search: Search, trial: Trial, progress: bool = False) -> dict[str, str]:
    """Make, measure and store one trial unless that was done, is hopeless, or comes too late.

    Returns its ``state``, and in ``why`` what kept it from being measured.
    """
    if finished(search, trial):
        return {"state": "reused", "why": ""}
    if why := hopeless(search, trial):
        return {"state": "skipped", "why": why}
    if time.time() + _longest(search) > search.deadline:
        return {"state": "not started", "why": "the time limit"}
    shutil.rmtree(search.bundle(trial), ignore_errors=True)  # a damaged one
    try:
        if trial.ratio:
            pruned_checkpoint(search, trial.ratio, progress)
            if why := hopeless(search, trial):
                return {"state": "skipped", "why": why}
        compress_model(
            str(search.pruned(trial.ratio)) if trial.ratio else search.source,
            search.bundle(trial),
            trial.recipe,
            task=search.task,
            eval_text=search.eval_text,
            calibration=search.calibration,
            reference=search.source if trial.ratio else None,
            progress=progress,
        )
    except GeminiEdgeError as error:
        return {"state": "failed", "why": error.cause}
    return {"state": "measured", "why": ""}


def finished(search: Search, trial: Trial) -> dict[str, Any] | None:
    """The report of a trial that lies there complete."""
    try:
        report: dict[str, Any] = read_bundle(search.bundle(trial), verify=False).json("report.json")
    except BundleError:
        return None
    return report


def hopeless(search: Search, trial: Trial) -> str:
    """Why a trial cannot keep to the loss allowed, or "": something milder lost far more already.

    Milder is a recipe of ``MILDER`` before this one, or the same, with no more pruned; and the pruned
    checkpoint itself, before any quantization.
    """
    if search.max_drop is None:
        return ""
    lost = {}
    for other in search.trials:
        if other.ratio > trial.ratio:
            continue
        if other.ratio and (search.pruned(other.ratio) / "pruning.json").is_file():
            lost[f"fp32, {100 * other.ratio:g} % pruned,"] = _pruning_loss(search, other.ratio)
        if other != trial and _is_milder(other.recipe, trial.recipe) and (report := finished(search, other)):
            lost[other.name] = report["drop_percent"]
    far = _FAR * max(1.0, search.max_drop)
    worst = next((name for name, drop in lost.items() if drop is not None and drop > far), None)
    return f"{worst} loses {lost[worst]:.1f} % already" if worst else ""


def pruned_checkpoint(search: Search, ratio: float, progress: bool = False) -> None:
    """Prune once for all recipes: feed-forward units, or where none can be cut experts; what lies there
    complete is used again."""
    target = search.pruned(ratio)
    if (target / "pruning.json").is_file():
        return
    prune = partial(
        prune_checkpoint,
        search.source,
        target,
        task=search.task,
        calibration=search.calibration,
        eval_text=search.eval_text,
        progress=progress,
    )
    try:
        prune(width=ratio)
    except RecipeError as reason:
        try:
            prune(experts=ratio)
        except RecipeError:
            raise reason from None


def _pruning_loss(search: Search, ratio: float) -> float | None:
    report = json.loads((search.pruned(ratio) / "pruning.json").read_text("utf-8"))
    before, after = (report[part].get(report["metric"]) for part in ("before", "after"))
    return loss_percent(report["metric"], after, before)


def _is_milder(recipe: str, other: str) -> bool:
    known = recipe in MILDER and other in MILDER
    return recipe == other or (known and MILDER.index(recipe) <= MILDER.index(other))


def _longest(search: Search) -> float:
    """Seconds that the slowest trial so far took: what to expect of the next one."""
    reports = [finished(search, trial) for trial in search.trials]
    return max((sum(report["seconds"].values()) for report in reports if report), default=0.0)
