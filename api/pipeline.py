"""The whole way: checkpoint, reference, recipe, export, bundle, measurement, gate, report.

report = compress_model("smollm2-135m", "bundles/smollm2", "int4", max_drop=20)
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gemini.benchmarks.host import host_facts
from gemini.benchmarks.metrics import loss_percent
from gemini.benchmarks.report import to_plain, write_report
from gemini.benchmarks.resources import peak_rss_mb
from gemini.benchmarks.text import TextSource, default_text, read_text
from gemini.compress.apply import run_recipe
from gemini.compress.dense import dense_weights
from gemini.compress.recipe import Recipe, load_recipe
from gemini.compress.specs import QuantizeInt4
from gemini.errors import GateError
from gemini.export.bundle import check_output, commit, describe, staging, write_companions, write_manifest
from gemini.export.exporter import export_checkpoint
from gemini.judges import Judge, make_judge
from gemini.model.checkpoint import Checkpoint, load_checkpoint
from gemini.pair_judge import calibration_feeds
from gemini.samples import sentence_windows, text_windows

CALIBRATION_WINDOWS, CALIBRATION_WINDOW = 12, 256
CALIBRATION_SENTENCES = 100


def compress_model(
    source: str,
    output: str | Path,
    recipe: str,
    *,
    task: str | None = None,
    eval_text: str | None = None,
    calibration: str | None = None,
    max_drop: float | None = None,
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Compress ``source`` with ``recipe`` into the bundle ``output``; returns the report.

    max_drop: percent of the fp32 metric that may be lost. A bundle that loses more is put at ``output`` +
    ".rejected" with its report, and GateError is raised; an existing bundle at ``output`` stays.
    """
    output = Path(output)
    stages = Stages(progress)
    check_output(output, force)
    chosen = load_recipe(recipe)
    texts = _texts(eval_text, calibration)
    with stages("load"):
        checkpoint = load_checkpoint(source, task)
    with tempfile.TemporaryDirectory(prefix="gemini-edge-") as scratch, staging(output) as folder:
        fp32_bytes = stored_bytes(checkpoint)
        with stages("measure fp32"):
            judge = make_judge(checkpoint, texts["evaluation"], Path(scratch))
        windows = _calibration(checkpoint, chosen, texts["calibration"])
        plain = round_to_nearest(chosen)
        nearest = None
        if plain is not None:
            with stages("measure round-to-nearest"), restored(checkpoint):
                run_recipe(checkpoint, plain, None, progress)
                with dense_weights(checkpoint.model):
                    nearest = judge.score_torch()
        with stages("compress"):
            passes = run_recipe(checkpoint, chosen, calibration_feeds(checkpoint, windows or ()), progress)
        with stages("export and verify"):
            exported = export_checkpoint(checkpoint, folder, progress)
        manifest = describe(checkpoint, exported)
        manifest |= {"recipe": chosen.to_dict(), "passes": [to_plain(asdict(p)) for p in passes]}
        write_companions(checkpoint, folder)
        write_manifest(folder, manifest)
        score, latency = _measure(folder, judge, stages)
        size = sum(file.stat().st_size for file in folder.iterdir())
        table = [_row("fp32", fp32_bytes, judge.reference)]
        table += [_row("round-to-nearest", None, nearest)] if nearest else []
        table += [_row("bundle", size, score)]
        drop = loss_percent(judge.metric, score.get(judge.metric), judge.reference.get(judge.metric))
        passed = max_drop is None or (drop is not None and drop <= max_drop)
        gate = "not set" if max_drop is None else "passed" if passed else "failed"
        report = {
            "name": checkpoint.name,
            "task": checkpoint.task,
            "recipe": chosen.to_dict(),
            "table": table,
            "metric": judge.metric,
            "drop_percent": drop,
            "max_drop": max_drop,
            "gate": gate,
            "passes": manifest["passes"],
            "verification": manifest["verification"],
            "latency": latency,
            "bytes": manifest["bytes"],
            "data": {
                "evaluation": judge.data(),
                "calibration": {
                    **texts["calibration"].to_dict(),
                    "tokens": sum(w.size for w in windows or []),
                },
            },
            "host": host_facts(),
            "provenance": manifest["provenance"],
            "seconds": stages.seconds,
            "peak_rss_mb": peak_rss_mb(),
        }
        write_report(report, folder)
        manifest["metrics"] = to_plain(
            {k: report[k] for k in ("table", "metric", "drop_percent", "max_drop", "gate")}
        )
        write_manifest(folder, manifest)
        stages.done()
        if not passed:
            _reject(folder, output, judge.metric, drop, max_drop)
        commit(folder, output)
    return json.loads(json.dumps(to_plain({**report, "bundle": str(output)})))


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
        self.seconds[name] = round(time.perf_counter() - start, 2)
        if self.progress:
            print(f"\r{name}: {self.seconds[name]:.1f} s", file=sys.stderr, flush=True)

    def done(self) -> None:
        """Add the total."""
        self.seconds["total"] = round(time.perf_counter() - self.start, 2)


def _texts(eval_text: str | None, calibration: str | None) -> dict[str, TextSource]:
    """The user's texts where given, else the halves of the built-in one."""
    built_in = default_text()
    sources = {
        "evaluation": (eval_text, built_in.evaluation, "second half"),
        "calibration": (calibration, built_in.calibration, "first half"),
    }
    return {
        key: TextSource(Path(path).name, read_text(path))
        if path
        else TextSource(f"{built_in.name}, {half}", text)
        for key, (path, text, half) in sources.items()
    }


def _calibration(checkpoint: Checkpoint, recipe: Recipe, text: TextSource) -> list[Any] | None:
    """Token windows for recipes that look at activations; None for those that do not."""
    looks = any(getattr(spec, key, False) for spec in recipe.specs for key in ("search", "gptq", "smoothing"))
    if checkpoint.tokenizer is None or not looks:
        return None
    if checkpoint.family == "encoder":
        return sentence_windows(checkpoint, text, CALIBRATION_SENTENCES)
    return text_windows(checkpoint, text, CALIBRATION_WINDOWS, CALIBRATION_WINDOW)


def round_to_nearest(recipe: Recipe) -> Recipe | None:
    """The same bits and blocks without search or promoted layers; None if the recipe has neither."""
    specs = tuple(
        replace(spec, search=False, gptq=False, sensitive_share=0.0)
        if isinstance(spec, QuantizeInt4)
        else spec
        for spec in recipe.specs
    )
    return None if specs == recipe.specs else replace(recipe, name=f"{recipe.name}, nearest", specs=specs)


@contextmanager
def restored(checkpoint: Checkpoint) -> Iterator[None]:
    """Put every module of the model back where it was when the block ends."""
    before = [
        (parent, name, child)
        for parent in checkpoint.model.modules()
        for name, child in parent.named_children()
    ]
    try:
        yield
    finally:
        for parent, name, child in before:
            setattr(parent, name, child)


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


def _reject(folder: Path, output: Path, metric: str, drop: float | None, max_drop: float | None) -> None:
    rejected = output.with_name(f"{output.name}.rejected")
    shutil.rmtree(rejected, ignore_errors=True)
    commit(folder, rejected)
    lost = "cannot be measured" if drop is None else f"lost {drop:.1f} %"
    raise GateError(
        f"{metric} {lost}, more than the {max_drop:g} % allowed; the bundle lies at {rejected}.",
        "Use a recipe with more bits, calibrate on text like yours, or allow more with --max-drop.",
    )
