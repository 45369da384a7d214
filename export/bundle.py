"""Write a bundle: everything into a folder beside the target, then one rename.

A crash, a full disk or Ctrl-C leaves either the old bundle or none; the unfinished folder is removed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gemini.errors import BundleError, ExportError
from gemini.export.encoder_decoder import decoder_vocabulary
from gemini.export.exporter import Exported
from gemini.export.tokenizer_files import write_tokenizer
from gemini.model.checkpoint import Checkpoint
from gemini.model.text import end_tokens
from gemini.runtime.bundle import MANIFEST_NAME, file_digest, seal
from gemini.runtime.schema import SCHEMA_VERSION

TOOLS = ("gemini-edge", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "optimum", "bitsandbytes")


def check_output(output: Path, force: bool) -> None:
    """Refuse, before any work is done, a target that must not be written."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise BundleError(f"{output} exists and is not a folder.", "Choose another --output.")
    if not output.exists():
        return
    empty = not any(output.iterdir())
    if not empty and not (output / MANIFEST_NAME).is_file():
        raise BundleError(
            f"{output} exists and holds something that is not a bundle.", "Choose another --output."
        )
    if not force and not empty:
        raise BundleError(
            f"{output} already holds a bundle.", "Add --force to replace it, or choose another --output."
        )


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A new folder beside ``output`` on the same disk; removed at the end unless it was renamed away."""
    folder = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
        folder.chmod(0o755)
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BundleError(
                f"The disk of {output.parent} is full; nothing was changed.", "Free some space and run again."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise BundleError(
                f"{output.parent} cannot be written ({error.strerror}).", "Choose another --output."
            ) from error
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def commit(folder: Path, output: Path) -> None:
    """Rename the finished folder to its place; an old bundle is kept until the new one stands there."""
    for file in folder.iterdir():
        _flush(file)
    old = None
    if output.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
        output.rename(old / "bundle")
    try:
        folder.rename(output)
    except BaseException:
        if old is not None:
            (old / "bundle").rename(output)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer and chat_template.jinja, or preprocessor.json: what the runtime needs beside the
    graph."""
    if checkpoint.tokenizer is not None:
        backend = checkpoint.tokenizer.backend_tokenizer
        # A batch that was tokenized earlier leaves its padding behind; the runtime pads by itself.
        backend.no_padding()
        backend.no_truncation()
        write_tokenizer(backend, folder)
        template = checkpoint.tokenizer.chat_template
        if isinstance(template, str) and checkpoint.family == "decoder":
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if checkpoint.processor is not None:
        from gemini.model.vision import normalized_preprocessor

        document = json.dumps(normalized_preprocessor(checkpoint.processor), indent=2, sort_keys=True)
        (folder / "preprocessor.json").write_text(document + "\n", encoding="utf-8")


def describe(checkpoint: Checkpoint, exported: Exported) -> dict[str, Any]:
    """The part of the manifest that is known once the graph stands."""
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": checkpoint.name,
        "task": checkpoint.task,
        "family": checkpoint.family,
        "graphs": exported.graphs,
        "model": exported.model,
        "form": str(exported.form),
        "twins": exported.twins,
        "fusions": exported.fusions,
        "nodes": exported.nodes,
        "bytes": exported.bytes,
        "verification": exported.verification,
        "refused_forms": exported.refused,
        "provenance": {
            "source": checkpoint.source,
            "tools": {name: _version(name) for name in TOOLS},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        "requirements": {
            "onnxruntime": ".".join((_version("onnxruntime") or "1.31").split(".")[:2]),
            "operators": exported.operators,
            "opsets": exported.opsets,
        },
    }
    if exported.half_graphs:
        manifest |= {
            "half_graphs": exported.half_graphs,
            "half_verification": exported.half_verification,
        }
    if exported.fused_verification:
        manifest |= {
            "fused_graphs": exported.fused_graphs,
            "fused_verification": exported.fused_verification,
        }
    if "decoder" in checkpoint.family:
        manifest["generation"] = _generation(checkpoint)
    if checkpoint.family == "encoder-decoder":
        manifest["generation"] |= answer_facts(checkpoint)
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Hash every file of the folder and seal the manifest over them."""
    files = {
        path.name: {"sha256": file_digest(path), "size": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_NAME
    }
    (folder / MANIFEST_NAME).write_bytes(seal({**manifest, "files": files}))


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.model.generation_config
    if checkpoint.family == "decoder":
        vocabulary = checkpoint.model.get_input_embeddings().num_embeddings
    else:
        vocabulary = decoder_vocabulary(checkpoint.model)
    known = [token for token in end_tokens(checkpoint.model) if 0 <= token < vocabulary]
    defaults = {
        name: getattr(config, name, None)
        for name in ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    }
    return {
        "eos_token_ids": known,
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "defaults": {name: value for name, value in defaults.items() if value is not None},
    }


def answer_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """How answers of an encoder-decoder begin, which tokens they never hold, how tasks are asked for, and
    what a classification is answered with.
    """
    config, own = checkpoint.model.generation_config, checkpoint.model.config
    names = ("decoder_start_token_id", "bos_token_id")
    starts = (getattr(source, name, None) for name in names for source in (config, own))
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise ExportError(
            "The checkpoint does not say which token the decoder starts with.",
            "Set decoder_start_token_id in generation_config.json.",
        )
    # A list would be one start a language, of which the first is as good as any.
    first = [start[0] if isinstance(start, list) else start]
    forced = [] if config.forced_bos_token_id is None else [config.forced_bos_token_id]
    suppressed = {*(config.suppress_tokens or ()), *(w[0] for w in config.bad_words_ids or () if len(w) == 1)}
    tasks = getattr(own, "task_specific_params", None) or {}
    prefixes = {task: options.get("prefix") for task, options in tasks.items() if isinstance(options, dict)}
    return {
        "decoder_start_ids": first + forced,
        "suppressed_ids": sorted(suppressed),
        "prefixes": {task: prefix for task, prefix in prefixes.items() if prefix},
        **_label_facts(checkpoint, tasks.get("text-classification")),
    }


def _label_facts(checkpoint: Checkpoint, options: Any) -> dict[str, Any]:
    """The token that each label is answered with, where the configuration names labels for that task."""
    labels = options.get("labels") if isinstance(options, dict) else None
    if not labels or checkpoint.tokenizer is None:
        return {}
    known, longest = checkpoint.tokenizer.get_vocab(), options.get("longest")
    remedy = "Correct task_specific_params in config.json, or leave `labels` out."
    if not isinstance(labels, dict) or not all(str(token) in known for token in labels.values()):
        raise ExportError(
            f"The labels of the task text-classification are no tokens of the vocabulary: {labels!r}.", remedy
        )
    if longest is not None and not (isinstance(longest, int) and longest > 0):
        raise ExportError(f"The task text-classification reads {longest!r} tokens at the most.", remedy)
    ids = {str(label): known[str(token)] for label, token in labels.items()}
    return {"label_ids": ids, "longest_classified": longest}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
