"""Recipes tried beside shares of pruning, and the trial that is best within the limits kept as the bundle.

report = search_recipes("gemini-nano", "bundles/nano", max_drop=5, time_limit=30)

A trial is a bundle of its own, made by the pipeline in the folder OUTPUT.search, where its report is its
result: a search that is started again finds it there, whatever ended the one before. Trials run one after
another, or side by side through Ray Tune; then the disks of all machines must show the same folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gemini.benchmarks.bench import run_bench
from gemini.benchmarks.host import host_facts
from gemini.compress.pareto import Candidate, Limits, closest, front, near_front, pick
from gemini.compress.recipe import BUILTIN
from gemini.errors import GateError, GeminiEdgeError, RecipeError, UsageError
from gemini.export.bundle import check_output
from gemini.model import catalog
from gemini.model.checkpoint import load_checkpoint
from gemini.runtime.bundle import file_digest
from gemini.samples import NEW_TOKENS, PROMPT_TOKENS
from gemini.search_report import keep_winner, write_results
from gemini.side_by_side import side_by_side
from gemini.trials import MILDER, Search, Trial, finished, pruned_checkpoint, run_trial

RATIOS = (0.0, 0.1, 0.2)
RECIPES = ("int8", "int4", "int4-fast")
MINUTES = 60.0
_SLACK = 0.5  # a trial's own time may be off by half: other work ran beside it
_ROUNDS = 5
_NAMED = 3


def search_recipes(
    source: str,
    output: str | Path,
    *,
    max_latency: float | None = None,
    max_drop: float | None = None,
    time_limit: float = MINUTES,
    ratios: Sequence[float] = RATIOS,
    recipes: Sequence[str] = RECIPES,
    ray: str | None = None,
    task: str | None = None,
    eval_text: str | None = None,
    calibration: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Try every recipe with every ratio and keep the best within the limits as the bundle ``output``.

    max_latency: milliseconds for a token after the first of a generator, for one call of other models.
    max_drop: percent of the fp32 metric. What is best is said in ``pareto.pick``. time_limit: minutes after
    which no trial starts; one is also left out when it is hopeless. ratios: shares of the feed-forward units
    to prune. ray: "local", or the address of a cluster, to run trials side by side.

    Returns the results, which lie as search.json, search.md and pareto.png in ``output`` + ".search".
    GateError when no trial keeps to the limits (``output`` stays as it was), UsageError for impossible
    options, RecipeError when no trial can be finished at all.
    """
    limits = Limits(max_latency, max_drop)
    _check(limits, time_limit, ratios)
    output = Path(output).resolve()
    check_output(output, force)
    trials = [
        Trial(_anywhere(recipe), ratio)
        for ratio in sorted({*map(float, ratios)})
        for recipe in _by_mildness(recipes)
    ]
    checkpoint = load_checkpoint(source, task)
    search = Search(
        source=source if source in catalog.CATALOG else str(Path(source).resolve()),
        name=checkpoint.name,
        task=checkpoint.task,
        eval_text=eval_text and _anywhere(eval_text),
        calibration=calibration and _anywhere(calibration),
        max_drop=max_drop,
        folder=output.with_name(f"{output.name}.search"),
        digest=_digest(checkpoint.source["sha256"], checkpoint.task, eval_text, calibration),
        deadline=time.time() + 60 * time_limit,
        trials=tuple(trials),
    )
    origin, context = checkpoint.source, checkpoint.context_length
    del checkpoint
    with _alone(search.folder), _kept(search.folder, progress):
        outcomes = _run_beside(search, ray) if ray else _run_in_turn(search, progress)
        results = {"source": origin, **_results(search, limits, outcomes, context, progress)}
        write_results(results, search.folder)
        if results["winner"] is None:
            raise _missed(results, limits, search.folder)
        best = search.bundle(trials[next(i for i, row in enumerate(results["rows"]) if row["winner"])])
        keep_winner(best, output, results)
    return {**results, "bundle": str(output), "folder": str(search.folder)}


def _by_mildness(recipes: Sequence[str]) -> list[str]:
    """Mild ones first: they are quick to make, and tell most about the others."""
    places = {name: place for place, name in enumerate(MILDER)}
    return sorted(dict.fromkeys(recipes), key=lambda recipe: places.get(recipe, len(places)))


def _run_in_turn(search: Search, progress: bool) -> list[dict[str, str]]:
    outcomes = []
    for index, trial in enumerate(search.trials):
        if progress:
            print(f"trial {index + 1} of {len(search.trials)}: {trial.name}", file=sys.stderr)
        outcomes.append(run_trial(search, trial, progress))
        if progress and outcomes[-1]["state"] != "measured":
            print(" ".join(filter(None, outcomes[-1].values())), file=sys.stderr)
    return outcomes


def _run_beside(search: Search, address: str) -> list[dict[str, str]]:
    """Checkpoints are pruned first, so that no two trials prune the same."""
    ratios = sorted({trial.ratio for trial in search.trials if trial.ratio})
    place = search.folder / "ray"
    with side_by_side(address, place) as run:
        run(partial(_prune, search), ratios)
        outcomes = run(partial(run_trial, search), search.trials)
    return [one if isinstance(one, dict) else {"state": "failed", "why": str(one)} for one in outcomes]


def _prune(search: Search, ratio: float) -> str:
    """Prune for the trials to come; they meet and report what goes wrong."""
    try:
        pruned_checkpoint(search, ratio)
    except GeminiEdgeError as error:
        return error.cause
    return ""


def _results(
    search: Search,
    limits: Limits,
    outcomes: Sequence[dict[str, str]],
    context: int | None,
    progress: bool,
) -> dict[str, Any]:
    """What was found: a row for every trial, the front among them, and the winner.

    Trials on the front or near to it are timed again in turn, in one run, and only they can be on the front.
    """
    reports = [finished(search, trial) for trial in search.trials]
    found = {
        index: _candidate(index, report)
        for index, report in enumerate(reports)
        if report and report["drop_percent"] is not None
    }
    if not found:
        reasons = [outcome["why"] for outcome in outcomes if outcome["why"]]
        raise RecipeError(
            f"No trial could be finished: {(reasons or ['nothing can be measured'])[0]}",
            "Try one of them by itself: gemini-edge compress MODEL --recipe int8.",
        )
    near = [int(each.name) for each in near_front(list(found.values()), _SLACK)]
    if progress:
        print(f"timing {len(near)} trials in turn", file=sys.stderr)
    prompt = min(PROMPT_TOKENS, (context or PROMPT_TOKENS * 2) // 2)
    bench = run_bench(
        [search.bundle(search.trials[index]) for index in near],
        prompt_tokens=prompt,
        new_tokens=max(1, min(NEW_TOKENS, prompt - 2)),
        repeat=_ROUNDS,
    )
    latencies = dict(zip(near, (each["latency"] for each in bench["bundles"]), strict=True))
    for index, latency in latencies.items():
        found[index] = replace(found[index], latency_ms=_milliseconds(latency))
    best = {int(each.name) for each in front([found[index] for index in near])}
    winner = pick([found[index] for index in best], limits)
    chosen = None if winner is None else int(winner.name)
    first = reports[min(found)]
    assert first is not None
    rows = [
        {
            "trial": trial.name,
            "state": outcomes[index]["state"],
            "latency_ms": found[index].latency_ms if index in found else None,
            "loss_percent": found[index].loss_percent if index in found else None,
            "size_mb": found[index].bytes / 1e6 if index in found else None,
            "timed_again": index in near,
            "front": index in best,
            "winner": index == chosen,
            "why": outcomes[index]["why"],
        }
        for index, trial in enumerate(search.trials)
    ]
    return {
        "schema_version": 1,
        "name": search.name,
        "task": search.task,
        "metric": first["metric"],
        "time_of": _time_of(bench),
        "limits": {"latency_ms": limits.latency_ms, "loss_percent": limits.loss_percent},
        "winner": None if chosen is None else search.trials[chosen].name,
        "closest": [search.trials[int(c.name)].name for c in closest(list(found.values()), limits, _NAMED)],
        "rows": rows,
        "latency": None if chosen is None else latencies[chosen],
        "host": bench["host"],
    }


def _candidate(index: int, report: dict[str, Any]) -> Candidate:
    size = round(1e6 * report["table"][-1]["size_mb"])
    return Candidate(str(index), _milliseconds(report["latency"]), report["drop_percent"], size)


def _milliseconds(latency: dict[str, Any]) -> float:
    """The median for a token after the first, or for a call with one input, the last shape measured."""
    distribution = latency["token_ms"] if latency["kind"] == "generator" else latency["points"][-1]["ms"]
    return float(distribution["p50"])


def _time_of(bench: dict[str, Any]) -> str:
    latency = bench["bundles"][0]["latency"]
    if latency["kind"] == "generator":
        return "a token after the first"
    tokens = latency["points"][-1]["tokens"]
    return f"a call with one text of {tokens} tokens" if tokens else "a call with one picture"


def _missed(results: dict[str, Any], limits: Limits, folder: Path) -> GateError:
    rows = {row["trial"]: row for row in results["rows"]}
    near = "; ".join(
        f"{name} ({rows[name]['latency_ms']:.2f} ms, loss {rows[name]['loss_percent']:.1f} %)"
        for name in results["closest"]
    )
    asked = [f"{limits.latency_ms:g} ms"] if limits.latency_ms is not None else []
    asked += [f"a loss of {limits.loss_percent:g} %"] if limits.loss_percent is not None else []
    return GateError(
        f"No trial keeps to {' and '.join(asked)}; closest: {near}.",
        f"Allow more; the trials in {folder} are used again. Or search further, with other --recipes and "
        "--prune-ratios.",
    )


def _check(limits: Limits, time_limit: float, ratios: Sequence[float]) -> None:
    if limits == Limits():
        raise UsageError("A search needs a limit.", "Give --max-drop, --max-latency or both.")
    for option, value in (
        ("--max-latency", limits.latency_ms),
        ("--time-limit", time_limit),
        ("--max-drop", limits.loss_percent),
    ):
        if value is not None and not (0 < value < float("inf") or (option == "--max-drop" and value == 0)):
            raise UsageError(f"{option} {value:g} is impossible.", "Give a number above 0.")
    wrong = next((ratio for ratio in ratios if not 0 <= ratio < 1), None)
    if wrong is not None or not ratios:
        raise UsageError(f"Nothing can be pruned by {wrong}.", "Give --prune-ratios from 0 to below 1.")


def _anywhere(name: str) -> str:
    """A built-in name as it is, a path so that it means the same in another process's folder."""
    return name if name in BUILTIN else str(Path(name).resolve())


def _digest(checkpoint: str, task: str, *texts: str | None) -> str:
    """Of all that the result of a trial depends on, beside recipe and ratio."""
    host = host_facts()
    versions = [host["gemini_edge"], host["packages"]]
    facts = [checkpoint, task, [text and file_digest(Path(text)) for text in texts], versions]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the search's folder; what a killed trial left unfinished in it is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"Another search works in {folder}.", "Wait for it, or choose another --output."
            ) from None
        for left in (*folder.glob("trials/.*"), *folder.glob("pruned/*/.*")):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def _kept(folder: Path, progress: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if progress:
            print(f"Finished trials are in {folder}; the same command goes on.", file=sys.stderr)
        raise
