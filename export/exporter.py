"""Export a checkpoint: climb down the ladder of forms until one traces, loads and matches torch."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from gemini.compress.dense import dense_weights
from gemini.errors import ExportError, VerificationError
from gemini.export import graphs, verify
from gemini.export.blame import running_modules
from gemini.export.finish import finish
from gemini.export.float_compute import float_compute
from gemini.export.forms import LADDERS, Form
from gemini.export.fusions import fuse
from gemini.export.graph_file import write_graph, write_weights
from gemini.export.operators import check_operators
from gemini.export.trace_state import FormMismatch, tracing
from gemini.export.tracing import LOWEST_OPSET, trace
from gemini.export.twins.norm import OPSET as NORM_OPSET
from gemini.export.twins.rotary import LONGEST_TABLE
from gemini.export.twins.swap import twinned
from gemini.model.checkpoint import Checkpoint
from gemini.runtime.schema import LayerShape


class TraceFailure(Exception):
    """A module that cannot be traced in this form."""


@dataclass(frozen=True)
class Exported:
    """What an export left in its folder, and what the manifest says about it."""

    graphs: dict[str, str]
    model: dict[str, Any]
    form: Form
    twins: dict[str, int]
    fusions: dict[str, int]
    operators: list[str]
    opsets: dict[str, int]
    nodes: int
    bytes: dict[str, int]
    verification: dict[str, Any]
    refused: list[str]


def export_checkpoint(checkpoint: Checkpoint, folder: Path, progress: bool = True) -> Exported:
    """Write the checkpoint's graph and weights into ``folder`` (which exists); torch's module is left as it
    was.

    Raises ExportError when no form of the ladder can express the model, with the reason of each refusal.
    """
    layers = graphs.cache_layers(checkpoint) if checkpoint.family == "decoder" else []
    refused: list[str] = []
    for form in LADDERS[checkpoint.family]:
        try:
            return _export_form(checkpoint, form, layers, folder, refused, progress)
        except (FormMismatch, VerificationError) as reason:
            refused.append(f"{form}: {reason}")
        except (ExportError, OSError, KeyboardInterrupt):
            raise
        except TraceFailure as failure:
            refused.append(f"{form}: {failure}")
        except Exception as error:  # onnxruntime and onnx_ir raise dozens of kinds
            refused.append(f"{form}: {_first_line(error)}")
        for leftover in folder.glob(f"{checkpoint.family}.onnx*"):
            leftover.unlink()
    raise ExportError(
        f"{type(checkpoint.model).__name__} cannot be exported: {refused[-1].partition(': ')[2]}",
        "Rewrite that module without data-dependent control flow, or report the architecture.",
    )


def _export_form(
    checkpoint: Checkpoint,
    form: Form,
    layers: list[LayerShape],
    folder: Path,
    refused: list[str],
    progress: bool,
) -> Exported:
    name = checkpoint.family
    model, twins = _traced(checkpoint, form, layers)
    fired = fuse(model)
    finish(model)
    operators = check_operators(model)
    path, data = folder / f"{name}.onnx", folder / f"{name}.onnx.data"
    sizes = write_weights(model, data, progress)
    with float_compute(model), dense_weights(checkpoint.model):
        write_graph(model, path)
        verification = _verified(path, checkpoint, form, layers)
    write_graph(model, path)
    _check(path)
    return Exported(
        graphs={name: path.name},
        model=_facts(checkpoint, form, layers),
        form=form,
        twins=dict(sorted(twins.items())),
        fusions=fired,
        operators=operators,
        opsets=dict(sorted(model.opset_imports.items())),
        nodes=len(model.graph),
        bytes=_by_component(sizes, path),
        verification=verification.to_dict(),
        refused=list(refused),
    )


def _traced(checkpoint: Checkpoint, form: Form, layers: list[LayerShape]) -> tuple[ir.Model, Counter[str]]:
    model = checkpoint.model
    head = model.get_output_embeddings() if checkpoint.family == "decoder" else None
    sample = graphs.sample_inputs(checkpoint)
    with tracing(form) as state, twinned(model, form, checkpoint.context_length, sample, head) as twins:
        if checkpoint.family == "decoder":
            graph = graphs.decoder_graph(checkpoint, state, layers, head_picks=twins["PickPositions"] > 0)
        elif checkpoint.family == "encoder":
            graph = graphs.encoder_graph(checkpoint)
        else:
            graph = graphs.vision_graph(checkpoint)
        opset = NORM_OPSET if twins["NormTwin"] else LOWEST_OPSET
        with running_modules(model) as running:
            try:
                return trace(graph, opset), Counter(twins)
            except FormMismatch:
                raise
            except Exception as error:  # torch.export and the converter raise dozens of kinds
                raise TraceFailure(f"{running.innermost()} fails with {_first_line(error)}") from error


def _verified(
    path: Path, checkpoint: Checkpoint, form: Form, layers: list[LayerShape]
) -> verify.Verification:
    if checkpoint.family == "decoder":
        return verify.verify_decoder(path, checkpoint, form, layers)
    if checkpoint.family == "encoder":
        return verify.verify_encoder(path, checkpoint, form, graphs.encoder_graph(checkpoint).module)
    return verify.verify_vision(path, checkpoint, form, graphs.vision_graph(checkpoint).module)


def _check(path: Path) -> None:
    """The onnx checker on the finished file; its complaint would be our bug, but users must hear of it."""
    try:
        onnx.checker.check_model(os.fspath(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"The onnx checker refuses the graph: {_first_line(error)}", "Please report this."
        ) from error


def _facts(checkpoint: Checkpoint, form: Form, layers: list[LayerShape]) -> dict[str, Any]:
    """What the runtime has to know about the model."""
    config = checkpoint.model.config
    if checkpoint.family == "decoder":
        context = checkpoint.context_length or LONGEST_TABLE
        return {
            "vocab_size": _vocabulary(checkpoint),
            "context_length": min(context, LONGEST_TABLE) if form.rotary == "fused" else context,
            "layers": [vars(layer) for layer in layers],
            "cache": "shared" if form.shared_cache else "concat",
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


def _vocabulary(checkpoint: Checkpoint) -> int:
    return int(checkpoint.model.get_input_embeddings().num_embeddings)


def _by_component(sizes: dict[str, int], path: Path) -> dict[str, int]:
    """Bytes by the first part of the module path that tells components apart, plus the graph itself."""
    totals: Counter[str] = Counter()
    for name, size in sizes.items():
        parts = [p for p in name.split("+")[0].split(".") if not p.isdigit() and p not in ("model", "head")]
        totals[".".join(parts[:-1][-2:]) or "other"] += size
    totals["graph"] = path.stat().st_size
    return dict(totals.most_common())


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"
