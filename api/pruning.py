"""From a checkpoint to a smaller one of the same class: layers, experts, heads, widths, tokens.

report = prune_checkpoint("smollm2-135m", "smaller", width=0.25)
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gemini.benchmarks.report import to_plain
from gemini.benchmarks.text import TextSource, default_text, read_text
from gemini.calibration import calibration_windows
from gemini.compress.calibrate import Window
from gemini.compress.depth import prune_layers, states_to_have
from gemini.compress.expert_pruning import prune_experts
from gemini.compress.prune import prune_units
from gemini.compress.refit import Refitted, refit
from gemini.compress.vocabulary import prune_vocabulary, write_tokenizer
from gemini.errors import CheckpointError, UsageError
from gemini.judges import make_judge
from gemini.model import catalog
from gemini.model.checkpoint import Checkpoint, load_checkpoint
from gemini.model.vision import pixel_shape
from gemini.pair_judge import calibration_feeds
from gemini.recovery import Recovery, forget, prepare_recovery, recover_pruned
from gemini.samples import pictures

IMAGES = 16
# Windows that layers are chosen by; a model runs on them once, or once for every layer and each one left out.
LOOKED_AT = {"influence": 32, "divergence": 8}
# What makes a sentence encoder of a folder, beside the model and its tokenizer.
_SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def prune_checkpoint(
    source: str,
    output: str | Path,
    *,
    layers: float = 0.0,
    experts: float = 0.0,
    heads: float = 0.0,
    width: float = 0.0,
    vocabulary: Sequence[str] = (),
    by: str = "influence",
    compensate: bool = True,
    task: str | None = None,
    calibration: str | None = None,
    eval_text: str | None = None,
    recover: float | None = None,
    adapters: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Cut shares of what ``source`` has and write the smaller checkpoint to ``output``; returns the report.

    Layers go first, then experts, then heads and widths, then tokens: ``vocabulary`` names text files, and a
    token that they never use is left out. ``by`` as in ``depth.prune_layers``, ``compensate`` as in
    ``prune.prune_units``; what stays after layers, heads and widths is fitted to the whole model's states too
    (``refit.refit``).
    With ``recover`` a smaller generator learns so many minutes from what it was (`recovery.recover_pruned`),
    before tokens go. The report, pruning.json in the folder, has the accuracy before and after, and with
    ``recover`` that between cutting and learning, "unrecovered". RecipeError for what cannot be cut.
    """
    output = Path(output)
    calibrated = bool(layers or experts or heads or width)
    if not (calibrated or vocabulary):
        raise UsageError(
            "Nothing is to be cut.", "Give --layers, --experts, --heads, --width or --vocabulary."
        )
    if output.exists() and not force:
        raise CheckpointError(f"{output} exists already.", "Choose another folder, or add --force.")
    built_in = default_text()
    texts = [TextSource(Path(name).name, read_text(name)) for name in vocabulary]
    evaluation = TextSource(Path(eval_text).name, read_text(eval_text)) if eval_text else None
    evaluation = evaluation or TextSource(f"{built_in.name}, second half", built_in.evaluation)
    learning = TextSource(Path(calibration).name, read_text(calibration)) if calibration else None
    checkpoint = load_checkpoint(source, task)
    recovery = None
    if adapters and recover is None:
        raise UsageError("Adapters are named and nothing is to learn.", "Add --recover MINUTES.")
    if recover is not None:
        if not calibrated:
            raise UsageError("Leaving out tokens loses nothing to recover.", "Leave --recover out.")
        recovery = prepare_recovery(checkpoint, output, recover, None, learning, progress)
    with tempfile.TemporaryDirectory(prefix="gemini-edge-") as scratch:
        before = make_judge(checkpoint, evaluation, Path(scratch))
        windows, described = _windows(checkpoint, learning, recovery, progress) if calibrated else ([], {})
        made, cuts = checkpoint, []
        fitted: tuple[Refitted, ...] = ()
        # Noise stands for pictures here: it shows which layers matter, and nothing may be fitted to it.
        pictured = checkpoint.family == "vision" or checkpoint.processor is not None
        fits = compensate and not pictured
        pairs = kept = None
        if layers:
            looked_at = windows[: LOOKED_AT.get(by)]
            shallower = prune_layers(made.model, looked_at, fraction=layers, by=by, progress=progress)
            made = replace(made, model=shallower.model)
            cuts.append({"type": "layers", **to_plain(asdict(shallower.report))})
            pairs, kept = states_to_have(shallower.report), shallower.report.kept
            if fits:
                fitted = refit(made.model, checkpoint.model, windows, kept, progress=progress)
        if experts:
            fewer = prune_experts(made.model, windows, fraction=experts, progress=progress)
            made = replace(made, model=fewer.model)
            cuts.append({"type": "experts", **to_plain(asdict(fewer.report))})
        if heads or width:
            thinner = prune_units(
                made.model, windows, heads=heads, width=width, compensate=compensate, progress=progress
            )
            made = replace(made, model=thinner.model)
            cuts.append({"type": "units", **to_plain(asdict(thinner.report))})
            if fits:
                fitted += refit(made.model, checkpoint.model, windows, kept, progress=progress)
        learned = unrecovered = None
        if recovery:
            before.checkpoint = made
            unrecovered = before.score_torch()
            kind = {"cuts": cuts, "compensate": compensate}
            learned = recover_pruned(made.model, checkpoint.model, recovery, kind, adapters, progress, pairs)
        output.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
        try:
            _write(made, source, staged)
            if texts:
                made, cut = _cut_vocabulary(made, texts, staged)
                cuts.append(cut)
            smaller = load_checkpoint(str(staged), checkpoint.task)
            if texts and "decoder" in smaller.family:  # ids mean other tokens: no distribution to compare
                after = make_judge(smaller, evaluation, Path(scratch)).reference
            else:
                before.checkpoint = smaller
                after = before.score_torch()
            report = {
                "name": checkpoint.name,
                "task": checkpoint.task,
                "metric": before.metric,
                "before": {"parameters": parameters(checkpoint), **before.reference},
                "unrecovered": unrecovered,
                "after": {"parameters": parameters(made), **after},
                "cuts": cuts,
                "refitted": [asdict(each) for each in fitted],
                "recovery": learned,
                "evaluation": before.data(),
                "calibration": described,
            }
            plain: dict[str, Any] = json.loads(json.dumps(to_plain(report)))
            (staged / "pruning.json").write_text(json.dumps(plain, indent=1), "utf-8")
            if output.exists():
                shutil.rmtree(output)
            staged.chmod(0o755)
            staged.rename(output)
            forget(output)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return {**plain, "checkpoint": str(output)}


def parameters(checkpoint: Checkpoint) -> int:
    """Weights of the model, shared ones once."""
    return sum(parameter.numel() for parameter in checkpoint.model.parameters())


def _windows(
    checkpoint: Checkpoint, text: TextSource | None, recovery: Recovery | None, progress: bool
) -> tuple[list[Window], dict[str, Any]]:
    """Calibration data as the model reads it, and what to report about it."""
    if checkpoint.family == "vision":
        shape = pixel_shape(checkpoint.model)
        return [{"pixel_values": image[None]} for image in pictures(shape, IMAGES)], {"name": "smooth noise"}
    if recovery:
        rows, described = recovery.calibration()
        return list(rows), described
    windows, described = calibration_windows(checkpoint, text, progress)
    return calibration_feeds(checkpoint, windows), described


def _write(checkpoint: Checkpoint, source: str, folder: Path) -> None:
    checkpoint.model.save_pretrained(folder)
    for part in (checkpoint.tokenizer, checkpoint.processor):
        if part is not None:
            part.save_pretrained(folder)  # type: ignore[union-attr]
    if checkpoint.source["kind"] == "gguf":
        return
    origin = catalog.find(source) if checkpoint.source["kind"] == "catalog" else Path(source)
    for name in _SENTENCE_FILES:
        if origin.is_dir() and (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    pooling = origin / "1_Pooling" / "config.json"
    if origin.is_dir() and pooling.is_file():
        (folder / "1_Pooling").mkdir()
        shutil.copyfile(pooling, folder / "1_Pooling" / "config.json")


def _cut_vocabulary(
    checkpoint: Checkpoint, texts: Sequence[TextSource], folder: Path
) -> tuple[Checkpoint, dict[str, Any]]:
    """Leave out what the texts do not use, in the model and in the tokenizer's files of ``folder``."""
    if checkpoint.tokenizer is None:
        raise UsageError("This model has no vocabulary.", "Leave --vocabulary out.")
    backend: Tokenizer = checkpoint.tokenizer.backend_tokenizer
    smaller = prune_vocabulary(checkpoint.model, json.loads(backend.to_str()), [text.text for text in texts])
    smaller.model.save_pretrained(folder)
    write_tokenizer(folder, smaller.vocabulary, folder)
    cut = {
        "type": "vocabulary",
        "tokens_before": smaller.tokens_before,
        "tokens_after": smaller.tokens_after,
        "texts": [text.to_dict() for text in texts],
    }
    return replace(checkpoint, model=smaller.model), cut


def summary(report: dict[str, Any]) -> str:
    """The accuracy before and after in a few lines."""
    lines = []
    for key in ("parameters", report["metric"]):
        found = [(report[part] or {}).get(key) for part in ("before", "unrecovered", "after")]
        shown = [f"{v:,}" if isinstance(v, int) else f"{v:.3f}" for v in found if v is not None]
        lines.append(f"{key:<12}" + " -> ".join(shown))
    return "\n".join(lines)
