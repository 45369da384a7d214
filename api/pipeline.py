"""The whole way: checkpoint, reference, recipe, export, bundle, measurement, gate, report.

report = compress_model("smollm2-135m", "bundles/smollm2", "int4", max_drop=20)
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gemini.benchmarks.host import host_facts
from gemini.benchmarks.metrics import loss_percent
from gemini.benchmarks.report import to_plain, write_report
from gemini.benchmarks.resources import available_memory, peak_rss_mb
from gemini.benchmarks.text import TextSource, default_text, read_text
from gemini.budget import Planner, Target
from gemini.calibration import calibration_windows, only_text
from gemini.compress.apply import run_recipe
from gemini.compress.calibrate import Window
from gemini.compress.dense import dense_weights
from gemini.compress.recipe import Recipe, load_recipe
from gemini.compress.recover import twin
from gemini.compress.reports import PassReport
from gemini.compress.specs import QuantizeCache, QuantizeInt4, Spec
from gemini.errors import GateError, UsageError
from gemini.export.bundle import check_output, commit, describe, staging, write_companions, write_manifest
from gemini.export.exporter import export_checkpoint
from gemini.judges import Judge, make_judge
from gemini.model.checkpoint import Checkpoint, load_checkpoint
from gemini.model.disk import WORKING, room_for
from gemini.pair_judge import calibration_feeds
from gemini.recovery import Recovery, forget, prepare_recovery, recover_quantized
from gemini.tuning import tune_recipe

_NAMED = 5  # layers in the message of a gate that failed


def compress_model(
    source: str,
    output: str | Path,
    recipe: str | None = None,
    *,
    task: str | None = None,
    eval_text: str | None = None,
    calibration: str | None = None,
    target_size: float | None = None,
    target_bpw: float | None = None,
    max_drop: float | None = None,
    recover: float | None = None,
    teacher: str | None = None,
    codes: bool = True,
    kv_cache: str | None = None,
    gpu: bool = False,
    tune: bool = False,
    memory: float | None = None,
    reference: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Compress ``source`` with ``recipe`` into the bundle ``output``; returns the report.

    Without a recipe, a generator's formats are planned for what is asked: megabytes, or bits a weight, or
    the percent that may be lost; they are planned anew when the measured bundle misses it. Where nothing is
    asked, and for other models, the recipe is int8.

    max_drop: percent of the fp32 metric that may be lost. A bundle that loses more is put at ``output`` +
    ".rejected" with its report, and GateError is raised; an existing bundle at ``output`` stays.
    recover: minutes in which the quantized model learns from the unquantized one, or from ``teacher``, a
    model with the same vocabulary. A run that is cut off goes on when it is started again. ``codes``:
    those of 4-bit weights learn too, beside scales and norms.
    kv_cache: "int8" adds `QuantizeCache` to the recipe.
    gpu: the bundle also holds graphs in half precision, which a GPU runs over the same weights.
    tune: the recipe's blocks are chosen by measurement on this machine (`gemini.tuning`).
    memory: GB (10^9 bytes) that may be held, by default what the machine has to spare; weights that would
    not fit are read from files (`gemini.model.disk`), which changes nothing else.
    reference: the checkpoint that fp32 means, where ``source`` was cut from it.
    """
    output = Path(output)
    stages = Stages(progress)
    check_output(output, force)
    target = Target(target_size, target_bpw, max_drop)
    chosen = load_recipe(recipe or "int8")
    extra: tuple[Spec, ...] = (QuantizeCache(),) if kv_cache == "int8" else ()
    if kv_cache not in (None, "int8"):
        raise UsageError(f"The cache cannot be {kv_cache}.", "Use int8, or leave it out.")
    evaluation = _evaluation_text(eval_text)
    given = _calibration_source(calibration) if calibration else None
    limit = _memory_limit(memory)
    if teacher and recover is None:
        raise UsageError("A teacher is named and nothing is to learn.", "Add --recover MINUTES.")
    with (
        tempfile.TemporaryDirectory(prefix="gemini-edge-") as scratch,
        staging(output) as folder,
        room_for(output, limit) as room,
    ):
        with stages("load"):
            checkpoint = load_checkpoint(source, task)
        planned = _is_planned(checkpoint, recipe, target)
        tuning = None
        if tune:
            if planned:
                raise UsageError(
                    "Planned formats have blocks of their own.", "Give --recipe, or leave --tune out."
                )
            with stages("tune"):
                tuned = tune_recipe(checkpoint, chosen, progress=progress)
            chosen, tuning = tuned.recipe, tuned.to_dict()
        recovery = None
        if recover is not None:
            if not planned and not chosen.specs:
                raise UsageError("fp32 weights have nothing to recover from.", "Leave --recover out.")
            with stages("text to recover on"):
                text = None if checkpoint.family == "vision" else only_text(given)
                recovery = prepare_recovery(checkpoint, output, recover, teacher, text, progress, codes)
        with stages("measure fp32"):
            whole = load_checkpoint(reference, task) if reference else checkpoint
            fp32_bytes = stored_bytes(whole)
            judge = make_judge(whole, evaluation, Path(scratch))
            judge.checkpoint = checkpoint
            del whole
        windows: Sequence[Any] = ()
        described: dict[str, Any] = {}
        if planned or extra or _looks_at_activations(chosen):
            with stages("calibration text"):
                own = planned or bool(extra) or _rounds_by_activations(chosen)
                if own and recovery:
                    windows, described = recovery.calibration()
                else:
                    windows, described = calibration_windows(checkpoint, given, progress, own)
        feeds = calibration_feeds(checkpoint, windows)
        planner = None
        if planned:
            with stages("plan formats"):
                planner = Planner(checkpoint, feeds, target, progress)
                chosen = planner.first()
        plain = round_to_nearest(chosen)
        nearest = None
        if plain is not None:
            with stages("measure round-to-nearest"), restored(checkpoint):
                run_recipe(checkpoint, plain, None, progress)
                with dense_weights(checkpoint.model):
                    nearest = judge.score_torch()
        while True:
            resized = planner.resized if planner and target.size_mb is not None else None
            whole_recipe = replace(chosen, specs=(*chosen.specs, *extra))
            manifest, size, again = _build(
                checkpoint, whole_recipe, feeds, folder, stages, recovery, resized, gpu
            )
            if not again:
                score, latency = _measure(folder, judge, stages)
                drop = loss_percent(judge.metric, score.get(judge.metric), judge.reference.get(judge.metric))
                again = planner.repaired(drop) if planner else None
            if not again:
                break
            chosen = again
        table = [_row("fp32", fp32_bytes, judge.reference)]
        table += [_row("round-to-nearest", None, nearest)] if nearest else []
        table += [_row("bundle", size, score)]
        passed = max_drop is None or (drop is not None and drop <= max_drop)
        gate = "not set" if max_drop is None else "passed" if passed else "failed"
        report = {
            "name": checkpoint.name,
            "task": checkpoint.task,
            "recipe": manifest["recipe"],
            "plan": planner and planner.describe(),
            "table": table,
            "metric": judge.metric,
            "drop_percent": drop,
            "max_drop": max_drop,
            "gate": gate,
            "passes": manifest["passes"],
            "recovery": manifest.get("recovery"),
            "tuning": tuning,
            "verification": manifest["verification"],
            "latency": latency,
            "bytes": manifest["bytes"],
            "data": {
                "evaluation": judge.data(),
                "calibration": described,
                **({"recovery": recovery.lessons.described} if recovery else {}),
            },
            "host": host_facts(),
            "provenance": manifest["provenance"],
            "seconds": stages.seconds,
            "peak_rss_mb": peak_rss_mb(),
            "memory": room.to_dict(),
        }
        write_report(report, folder)
        if tuning:
            manifest["tuning"] = tuning
        manifest["metrics"] = to_plain(
            {k: report[k] for k in ("table", "metric", "drop_percent", "max_drop", "gate")}
        )
        write_manifest(folder, manifest)
        stages.done()
        forget(output)
        if not passed:
            _reject(folder, output, report)
        commit(folder, output)
    return json.loads(json.dumps(to_plain({**report, "bundle": str(output)})))


def _memory_limit(asked: float | None) -> float | None:
    """Bytes that may be held: ``asked`` GB, else what the machine has to spare; None if it does not say."""
    if asked is not None:
        return asked * 1e9
    spare = available_memory()
    return None if spare is None else max(spare, WORKING)


def _is_planned(checkpoint: Checkpoint, recipe: str | None, target: Target) -> bool:
    """Whether formats are planned. Without a decoder, products per channel are faster than any in blocks."""
    sized = target.size_mb is not None or target.bpw is not None
    if recipe is not None and sized:
        raise UsageError("A recipe and a size are asked for.", "Give one of them.")
    able = "decoder" in checkpoint.family and checkpoint.tokenizer is not None
    if sized and not able:
        raise UsageError(
            f"Sizes can be asked of models that generate; the task of this one is {checkpoint.task}.",
            "Use --recipe int8 or int4.",
        )
    return recipe is None and able and target != Target()


def _build(
    checkpoint: Checkpoint,
    recipe: Recipe,
    feeds: Sequence[Window],
    folder: Path,
    stages: Stages,
    recovery: Recovery | None,
    resized: Callable[[int], Recipe | None] | None,
    gpu: bool,
) -> tuple[dict[str, Any], int, Recipe | None]:
    """Put the compressed bundle's files into ``folder``; returns the manifest, their bytes and, where
    ``resized`` has one, a recipe to try instead. The model stays as it was.

    A size is settled before minutes are spent on recovery, which does not change it.
    """
    original = twin(checkpoint.model)
    again = None
    with restored(checkpoint):
        with stages("compress"):
            passes = run_recipe(checkpoint, recipe, feeds, stages.progress)
        if not recovery or resized:
            manifest = _export(checkpoint, recipe, passes, folder, stages, gpu)
            again = resized(_bytes(folder)) if resized else None
        if recovery and not again:
            with stages("recover"):
                learned = recover_quantized(checkpoint.model, original, recovery, recipe, stages.progress)
            manifest = _export(checkpoint, recipe, passes, folder, stages, gpu) | {"recovery": learned}
            write_manifest(folder, manifest)
    return manifest, _bytes(folder), again


def _export(
    checkpoint: Checkpoint,
    recipe: Recipe,
    passes: Sequence[PassReport],
    folder: Path,
    stages: Stages,
    gpu: bool,
) -> dict[str, Any]:
    """Write the model as it is now into ``folder``, over what is there."""
    for file in folder.iterdir():
        file.unlink()
    with stages("export and verify"):
        exported = export_checkpoint(checkpoint, folder, stages.progress, gpu)
    manifest = describe(checkpoint, exported)
    manifest |= {"recipe": recipe.to_dict(), "passes": [to_plain(asdict(p)) for p in passes]}
    write_companions(checkpoint, folder)
    write_manifest(folder, manifest)
    return manifest


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


class Stages:
    """Times the stages and names the running one on standard error."""

    def __init__(self, progress: bool) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.progress:
            print(f"{name} …", end="", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            if self.progress:
                print(file=sys.stderr)
            raise
        spent = time.perf_counter() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 2)
        if self.progress:
            print(f"\r{name}: {spent:.1f} s", file=sys.stderr, flush=True)

    def done(self) -> None:
        """Add the total."""
        self.seconds["total"] = round(time.perf_counter() - self.start, 2)


def _evaluation_text(path: str | None) -> TextSource:
    """The user's text where given, else half of the built-in one."""
    if path:
        return _users_text(path)
    built_in = default_text()
    return TextSource(f"{built_in.name}, second half", built_in.evaluation)


def _users_text(path: str) -> TextSource:
    return TextSource(Path(path).name, read_text(path))


def _looks_at_activations(recipe: Recipe) -> bool:
    keys = ("gptq", "awq", "smoothing", "block_smoothing", "static", "target_bpw")
    return any(
        isinstance(spec, QuantizeCache)
        or getattr(spec, "fit", "") == "moments"
        or any(getattr(spec, key, False) for key in keys)
        for spec in recipe.specs
    )


def _rounds_by_activations(recipe: Recipe) -> bool:
    """Whether text of the model's own kind pays, a minute's work; what only weighs features bears any."""
    return any(not isinstance(spec, QuantizeInt4) or spec.gptq or spec.awq for spec in recipe.specs)


def _calibration_source(path: str) -> TextSource | Path:
    """The user's text, or the folder of images."""
    return Path(path) if Path(path).is_dir() else _users_text(path)


def round_to_nearest(recipe: Recipe) -> Recipe | None:
    """The same bits and blocks rounded to nearest, without promoted layers; None if it is that already."""
    before = tuple(spec for spec in recipe.specs if not isinstance(spec, QuantizeCache))
    specs = tuple(
        replace(spec, fit="nearest", gptq=False, awq=False, sensitive_share=0.0)
        if isinstance(spec, QuantizeInt4)
        else spec
        for spec in before
    )
    return None if specs == before else replace(recipe, name=f"{recipe.name}, nearest", specs=specs)


@contextmanager
def restored(checkpoint: Checkpoint) -> Iterator[None]:
    """Put every module of the model back where it was when the block ends, and nothing beside them."""
    before = [(parent, dict(parent._modules)) for parent in checkpoint.model.modules()]
    try:
        yield
    finally:
        for parent, children in before:
            parent._modules.clear()
            parent._modules.update(children)


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the model's weights as they are, shared tensors once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in checkpoint.model.state_dict().values()}
    return sum(tensors.values())


def _measure(folder: Path, judge: Judge, stages: Stages) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracy and speed of the bundle as it will be shipped: loaded by the runtime, from its files."""
    from gemini.runtime import load

    with stages("measure bundle"):
        session = load(folder)
        score = judge.score_session(session)
    with stages("time bundle"):
        return score, judge.latency(session)


def _row(name: str, size: int | None, score: dict[str, Any]) -> dict[str, Any]:
    counts = ("tokens", "sentences", "examples")
    measured = {key: value for key, value in score.items() if key not in counts and value is not None}
    return {"name": name, "size_mb": None if size is None else size / 1e6, **measured}


def _reject(folder: Path, output: Path, report: Mapping[str, Any]) -> None:
    rejected = output.with_name(f"{output.name}.rejected")
    shutil.rmtree(rejected, ignore_errors=True)
    commit(folder, rejected)
    drop = report["drop_percent"]
    lost = "cannot be measured" if drop is None else f"lost {drop:.1f} %"
    layers = [layer for each in report["passes"] for layer in each["layers"]]
    worst = sorted(layers, key=lambda layer: -layer["relative_error"])[:_NAMED]
    named = ", ".join(f"{layer['name']} ({100 * layer['relative_error']:.2g} %)" for layer in worst)
    raise GateError(
        f"{report['metric']} {lost}, more than the {report['max_drop']:g} % allowed; the bundle lies at "
        f"{rejected}." + (f" Largest errors of a layer's output: {named}." if named else ""),
        "Use a recipe with more bits, leave out --recipe so that formats are planned, calibrate on text like "
        "yours, or allow more with --max-drop.",
    )
