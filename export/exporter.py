"""Export a checkpoint: climb down the ladder of forms until one traces, loads and matches torch."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from gemini.compress.cache import scales_of
from gemini.compress.dense import dense_weights
from gemini.errors import ExportError, VerificationError
from gemini.export import encoder_decoder, graphs, verify, verify_encoder_decoder
from gemini.export.blame import running_modules
from gemini.export.cache_bits import float_past, quantize_past
from gemini.export.finish import finish
from gemini.export.float_compute import float_compute
from gemini.export.forms import LADDERS, Form
from gemini.export.fusions import fuse
from gemini.export.graph_file import write_graph, write_weights
from gemini.export.half_precision import HALF_ONLY, half_precision
from gemini.export.lint import refuse_slow
from gemini.export.operators import check_operators
from gemini.export.stages import Shapes, fuse_stages, known_shapes
from gemini.export.trace_state import FormMismatch, tracing
from gemini.export.tracing import LOWEST_OPSET, NotConverted, trace
from gemini.export.twins.attention import OPSET as ATTENTION_OPSET
from gemini.export.twins.norm import OPSET as NORM_OPSET
from gemini.export.twins.rotary import LONGEST_TABLE
from gemini.export.twins.swap import twinned
from gemini.model.checkpoint import Checkpoint
from gemini.runtime import kernels
from gemini.runtime.schema import LayerShape

# How much further than onnxruntime's own kernels from torch the runtime's kernels may be.
FUSED_TOLERANCE = 2.0


class TraceFailure(Exception):
    """A module that cannot be traced in this form; or in none, as forms further down run more of its code."""

    def __init__(self, message: str, in_no_form: bool = False) -> None:
        super().__init__(message)
        self.in_no_form = in_no_form


@dataclass(frozen=True)
class Caches:
    """Shapes of what a decoder keeps: of its own tokens, and of the encoder's vectors. Empty for others."""

    own: list[LayerShape]
    cross: list[LayerShape]


@dataclass(frozen=True)
class Exported:
    """What an export left in its folder, and what the manifest says about it."""

    graphs: dict[str, str]
    half_graphs: dict[str, str]
    fused_graphs: dict[str, str]
    model: dict[str, Any]
    form: Form
    twins: dict[str, int]
    fusions: dict[str, int]
    operators: list[str]
    opsets: dict[str, int]
    nodes: int
    bytes: dict[str, int]
    verification: dict[str, Any]
    half_verification: dict[str, Any] | None
    fused_verification: dict[str, Any] | None
    refused: list[str]


def export_checkpoint(
    checkpoint: Checkpoint, folder: Path, progress: bool = True, gpu: bool = False
) -> Exported:
    """Write the checkpoint's graphs and weights into ``folder`` (which exists); torch's module is left as it
    was.

    ``gpu``: also graphs in half precision, over the same weights (`gemini.export.half_precision`). Raises
    ExportError when no form of the ladder can express the model, with the reason of each refusal.
    """
    caches = _caches(checkpoint)
    refused: list[str] = []
    for form in LADDERS[checkpoint.family]:
        try:
            return _export_form(checkpoint, form, caches, folder, refused, progress, gpu)
        except (FormMismatch, VerificationError) as reason:
            refused.append(f"{form}: {reason}")
        except (ExportError, OSError, KeyboardInterrupt):
            raise
        except TraceFailure as failure:
            refused.append(f"{form}: {failure}")
            if failure.in_no_form:
                break
        except Exception as error:  # onnxruntime and onnx_ir raise dozens of kinds
            refused.append(f"{form}: {_first_line(error)}")
        for leftover in folder.glob("*.onnx*"):
            leftover.unlink()
    last = refused[-1].partition(": ")[2].rstrip(".")
    raise ExportError(
        f"{type(checkpoint.model).__name__} cannot be exported: {last}.",
        "Rewrite that module without data-dependent control flow, or report the architecture.",
    )


def _caches(checkpoint: Checkpoint) -> Caches:
    if checkpoint.family == "encoder-decoder":
        return Caches(*encoder_decoder.cache_shapes(checkpoint))
    return Caches(graphs.cache_layers(checkpoint) if checkpoint.family == "decoder" else [], [])


def _export_form(
    checkpoint: Checkpoint,
    form: Form,
    caches: Caches,
    folder: Path,
    refused: list[str],
    progress: bool,
    gpu: bool,
) -> Exported:
    models, twins = _traced(checkpoint, form, caches)
    paths = {name: folder / f"{name}.onnx" for name in models}
    fired: Counter[str] = Counter()
    operators: set[str] = set()
    opsets: dict[str, int] = {}
    shapes: dict[str, Shapes] = {}
    for name, model in models.items():
        fired.update(fuse(model))
        shapes[name] = known_shapes(model)
        finish(model)
        operators |= set(check_operators(model))
        refuse_slow(model)
        opsets |= model.opset_imports
    scales = scales_of(checkpoint.model)
    if scales is not None:
        quantize_past(models["decoder"], scales.pairs())
    sizes = write_weights([*models.values()], folder / f"{checkpoint.family}.onnx.data", progress)
    with dense_weights(checkpoint.model):
        with ExitStack() as stack:
            for name, model in models.items():
                stack.enter_context(float_compute(model))
                with float_past(model):
                    write_graph(model, paths[name])
            verification = _verified(paths, checkpoint, form, caches)
            if scales is not None:
                pairs = scales.pairs()
                write_graph(models["decoder"], paths["decoder"])
                verify.verify_cache(paths["decoder"], checkpoint, form, caches.own, pairs, verification)
            halves: dict[str, Path] = {}
            if gpu:
                halves, half_verification = _half_graphs(models, checkpoint, form, caches, folder)
        for name, model in models.items():
            write_graph(model, paths[name])
        for path in (*paths.values(), *halves.values()):
            _check(path)
        fused, fused_verification = _fused_graphs(models, shapes, checkpoint, form, caches, paths)
    return Exported(
        graphs={name: path.name for name, path in paths.items()},
        half_graphs={name: path.name for name, path in halves.items()},
        fused_graphs={name: path.name for name, path in fused.items()},
        model=_facts(checkpoint, form, caches),
        form=form,
        twins=dict(sorted(twins.items())),
        fusions=dict(fired),
        operators=sorted(operators),
        opsets=dict(sorted(opsets.items())),
        nodes=sum(len(model.graph) for model in models.values()),
        bytes=_by_component(sizes, [*paths.values(), *halves.values(), *fused.values()]),
        verification=verification.to_dict(),
        half_verification=half_verification.to_dict() if halves else None,
        fused_verification=fused_verification,
        refused=list(refused),
    )


def _traced(checkpoint: Checkpoint, form: Form, caches: Caches) -> tuple[dict[str, ir.Model], Counter[str]]:
    """The graphs of the checkpoint's family by name, traced in this form."""
    model = checkpoint.model
    head = model.get_output_embeddings() if "decoder" in checkpoint.family else None
    # Only a rotary inside the operator needs a dry run, and no pair of graphs is tried with one.
    sample = {} if checkpoint.family == "encoder-decoder" else graphs.sample_inputs(checkpoint)
    with tracing(form) as state, twinned(model, form, checkpoint.context_length, sample, head) as twins:
        picks = twins["PickPositions"] > 0
        if checkpoint.family == "decoder":
            parts = [graphs.decoder_graph(checkpoint, state, caches.own, picks)]
        elif checkpoint.family == "encoder-decoder":
            parts = encoder_decoder.all_graphs(checkpoint, state, caches.own, caches.cross, picks)
        elif checkpoint.family == "encoder":
            parts = [graphs.encoder_graph(checkpoint)]
        else:
            parts = [graphs.vision_graph(checkpoint)]
        opset = max(
            LOWEST_OPSET,
            NORM_OPSET if twins["NormTwin"] else 0,
            ATTENTION_OPSET if form.attention != "model" else 0,
        )
        traced = {}
        for part in parts:
            with running_modules(model) as running:
                try:
                    traced[part.name] = trace(part, opset)
                except FormMismatch:
                    raise
                except NotConverted as error:
                    module = error.module or running.innermost()
                    raise TraceFailure(
                        f"{module} fails with {_first_line(error.reason)}", in_no_form=error.unknown_operator
                    ) from error
                except Exception as error:  # torch.export and the converter raise dozens of kinds
                    raise TraceFailure(f"{running.innermost()} fails with {_first_line(error)}") from error
        return traced, Counter(twins)


def _verified(
    paths: dict[str, Path],
    checkpoint: Checkpoint,
    form: Form,
    caches: Caches,
    tolerance: float = verify.TOLERANCE,
) -> verify.Verification:
    if checkpoint.family == "encoder-decoder":
        return verify_encoder_decoder.verify_encoder_decoder(paths, checkpoint, form, caches.own, tolerance)
    (path,) = paths.values()
    if checkpoint.family == "decoder":
        return verify.verify_decoder(path, checkpoint, form, caches.own, tolerance)
    if checkpoint.family == "encoder":
        module = graphs.encoder_graph(checkpoint).module
        return verify.verify_encoder(path, checkpoint, form, module, tolerance)
    return verify.verify_vision(path, checkpoint, form, graphs.vision_graph(checkpoint).module, tolerance)


def _half_graphs(
    models: dict[str, ir.Model], checkpoint: Checkpoint, form: Form, caches: Caches, folder: Path
) -> tuple[dict[str, Path], verify.Verification]:
    """The same graphs for a GPU: in float16, or in float32 around operators that are float16 there.

    The second is for activations that float16 cannot hold. ExportError if torch agrees with neither. Keys and
    values are float16 also where the float32 graph keeps them in 8 bits: with scales per channel, CUDA's
    operator has no fast decoding (group_query_attention.cc).
    """
    paths = {name: folder / f"{name}.half.onnx" for name in models}
    for only in ((), HALF_ONLY):
        try:
            for name, model in models.items():
                with float_past(model):
                    write_graph(half_precision(model, folder, only), paths[name])
            return paths, _verified(paths, checkpoint, form, caches, verify.HALF_TOLERANCE)
        except (VerificationError, ExportError) as error:
            reason = error.cause
    raise ExportError(f"The model does not compute in half precision: {reason}", "Leave --gpu out.")


def _fused_graphs(
    models: dict[str, ir.Model],
    shapes: dict[str, Shapes],
    checkpoint: Checkpoint,
    form: Form,
    caches: Caches,
    paths: dict[str, Path],
) -> tuple[dict[str, Path], dict[str, Any] | None]:
    """The same graphs for the runtime's own kernels, where those can be tried here.

    Both round activations to 8 bits, so torch is not a reference to the last digit: the own kernels may be as
    far from it as onnxruntime's, and as far again, by the mean square of all logits: rounding the last bit of
    an embedding changes that by 0.6 to 1.7 (benchmarks/LOG.md), and a mistake makes it tens of times as
    large. What fails is left out, with the reason.
    """
    if not kernels.available():
        return {}, None
    fused: dict[str, Path] = {}
    for name, model in models.items():
        if (copy := fuse_stages(model, shapes[name])) is not None:
            fused[name] = paths[name].with_suffix(".fused.onnx")
            write_graph(copy, fused[name])
    if not fused:
        return {}, None
    theirs = _verified(paths, checkpoint, form, caches, float("inf")).typical_difference
    reason = None
    try:
        ours = _verified(paths | fused, checkpoint, form, caches, float("inf"))
        allowed = FUSED_TOLERANCE * theirs + verify.TOLERANCE * max(1.0, *(c.magnitude for c in ours.cases))
        found = ours.typical_difference
        facts = {
            "typical_difference": found,
            "largest_difference": ours.largest_difference,
            "allowed": allowed,
            "cases": len(ours.cases),
        }
        if found <= allowed:
            return fused, facts
        reason = f"they differ from torch by {found:.3g}, and {allowed:.3g} is allowed"
    except Exception as error:  # onnxruntime raises dozens of kinds
        reason = _first_line(error)
    for path in fused.values():
        path.unlink()
    return {}, {"refused": reason}


def _check(path: Path) -> None:
    """The onnx checker on the finished file; its complaint would be our bug, but users must hear of it."""
    try:
        onnx.checker.check_model(os.fspath(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"The onnx checker refuses the graph: {_first_line(error)}", "Please report this."
        ) from error


def _facts(checkpoint: Checkpoint, form: Form, caches: Caches) -> dict[str, Any]:
    """What the runtime has to know about the model."""
    config = checkpoint.model.config
    if checkpoint.family == "decoder":
        return _decoder_facts(checkpoint, form, caches, _vocabulary(checkpoint))
    if checkpoint.family == "encoder-decoder":
        decoder = _decoder_facts(
            checkpoint, form, caches, encoder_decoder.decoder_vocabulary(checkpoint.model)
        )
        return {
            **encoder_decoder.source_facts(checkpoint),
            "context_length": decoder["context_length"],
            "cross": [vars(layer) for layer in caches.cross],
            "decoder": decoder,
        }
    labels = None
    if checkpoint.task.endswith("classification"):
        labels = [str(config.id2label[i]) for i in range(config.num_labels)]
    if checkpoint.family == "vision":
        _, channels, height, width = graphs.sample_inputs(checkpoint)["pixel_values"].shape
        return {"labels": labels, "image": {"channels": channels, "height": height, "width": width}}
    pooling = checkpoint.pooling
    problem = None
    if labels is not None:
        problem = (config.problem_type or "single_label_classification").removesuffix("_classification")
    return {
        "vocab_size": _vocabulary(checkpoint),
        "context_length": checkpoint.context_length,
        "inputs": list(graphs.sample_inputs(checkpoint)),
        "labels": labels,
        "problem": problem,
        "embedding_dim": None if pooling is None else config.hidden_size,
        "pooling": None if pooling is None else pooling.mode,
        "normalize": None if pooling is None else pooling.normalize,
        "pad_token_id": config.pad_token_id,
    }


def _decoder_facts(checkpoint: Checkpoint, form: Form, caches: Caches, vocabulary: int) -> dict[str, Any]:
    context = checkpoint.context_length or LONGEST_TABLE
    return {
        "vocab_size": vocabulary,
        "context_length": min(context, LONGEST_TABLE) if form.rotary == "fused" else context,
        "layers": [vars(layer) for layer in caches.own],
        "cache": "shared" if form.shared_cache else "concat",
    }


def _vocabulary(checkpoint: Checkpoint) -> int:
    return int(checkpoint.model.get_input_embeddings().num_embeddings)


def _by_component(sizes: dict[str, int], paths: list[Path]) -> dict[str, int]:
    """Bytes by the first part of the module path that tells components apart, plus the graphs themselves."""
    totals: Counter[str] = Counter()
    for name, size in sizes.items():
        parts = [
            p
            for p in name.split("+")[0].split(".")
            if not p.isdigit() and p not in ("model", "head", "parts")
        ]
        totals[".".join(parts[:-1][-2:]) or "other"] += size
    totals["graph"] = sum(path.stat().st_size for path in paths)
    return dict(totals.most_common())


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"
