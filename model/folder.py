"""A checkpoint folder on disk: its configuration, the kind of weights it holds, and its hash."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gemini.errors import CheckpointError
from gemini.model.offline import first_line, import_transformers
from gemini.model.pooling import read_json
from gemini.model.safetensors_check import INDEX_FILE, SINGLE_FILE

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_folder(folder: Path) -> None:
    """Refuse folders that cannot be a safetensors checkpoint, each with its own reason.

    Raises:
        CheckpointError: missing, empty, a bundle, an adapter, pickles only, no weights or no configuration.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no checkpoint folder {str(folder)!r}.", "Check the path; nothing is downloaded."
        )
    names = {path.name for path in folder.iterdir()}
    if not names:
        raise CheckpointError(
            f"The folder {str(folder)!r} is empty.", "Pass a folder with config.json and weights."
        )
    if "manifest.json" in names and "config.json" not in names:
        raise CheckpointError(
            f"{str(folder)!r} is a compressed bundle, not a checkpoint.",
            "Pass the checkpoint it was made from.",
        )
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{str(folder)!r} holds an adapter, not a whole model.",
            "Merge it into its base model and save that.",
        )
    if not names & {SINGLE_FILE, INDEX_FILE}:
        raise _no_weights(folder, names)
    if "config.json" not in names:
        raise CheckpointError(
            f"The folder {str(folder)!r} has weights and no config.json.",
            "Save the model with save_pretrained.",
        )


def _no_weights(folder: Path, names: set[str]) -> CheckpointError:
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if ggufs:
        return CheckpointError(
            f"{str(folder)!r} holds GGUF files.", f"Pass the file itself: {folder / ggufs[0]}."
        )
    if pickles:
        return CheckpointError(
            f"{str(folder)!r} holds only pickled weights ({pickles[0]}), and a pickle can run any code.",
            "Convert it to safetensors: load it where you trust it and call save_pretrained.",
        )
    if others:
        return CheckpointError(
            f"{str(folder)!r} holds {others[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}.",
            f"Rename the file to {SINGLE_FILE}, or add the index of its shards.",
        )
    return CheckpointError(
        f"{str(folder)!r} has no weights.", f"Add {SINGLE_FILE}, or pass the folder that has it."
    )


def read_config(folder: Path) -> Any:
    """The transformers configuration of a folder, without running code that comes with it.

    Raises:
        CheckpointError: unreadable JSON, a model type that transformers does not have, weights that are
            already quantized, or values that the model type refuses.
    """
    transformers = import_transformers()
    raw = read_json(folder / "config.json", dict)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        cause = f"The model type {kind!r} is not part of transformers {transformers.__version__}"
        if "auto_map" in raw:
            cause += ", and remote code that comes with a checkpoint is not run"
        raise CheckpointError(f"{cause}.", "Use a checkpoint of an architecture that transformers has.")
    if raw.get("quantization_config"):
        method = raw["quantization_config"]
        method = method.get("quant_method", "another tool") if isinstance(method, dict) else "another tool"
        raise CheckpointError(
            f"The weights are already quantized by {method}.", "Pass the checkpoint before its quantization."
        )
    if raw.get("transformers_weights"):
        raise CheckpointError(
            "config.json redirects to other weight files (`transformers_weights`).",
            f"Remove the entry and name the weights {SINGLE_FILE}.",
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # any type: each model type checks its values in its own way
        raise CheckpointError(
            f"config.json does not describe a {kind!r} model: {first_line(error)}.",
            "Use the config.json that was saved with these weights.",
        ) from error


def hash_files(root: Path, paths: Iterable[Path]) -> str:
    """SHA-256 (hex) over the sorted (name, size, bytes) of the existing files, names relative to ``root``."""
    digest = hashlib.sha256()
    existing = {path.relative_to(root).as_posix(): path for path in paths if path.is_file()}
    for name, path in sorted(existing.items()):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def read_licence(folder: Path) -> str:
    """The licence that the model card (README.md front matter) states, or "unknown"."""
    card = folder / "README.md"
    if not card.is_file():
        return "unknown"
    with card.open("r", encoding="utf-8", errors="replace") as file:
        head = file.read(20_000)
    front = head.split("\n---", 1)[0] if head.startswith("---") else ""
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", front, re.MULTILINE)
    return found.group(1) if found else "unknown"
