"""How an encoder's token states become one embedding, read from the files sentence-transformers writes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini.errors import CheckpointError

# Flags of 1_Pooling/config.json (sentence-transformers up to 5.0) that we know how to put into a graph.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
_MODES = tuple(_FLAGS.values())


@dataclass(frozen=True)
class Pooling:
    """How token states (batch, sequence, dim) become an embedding (batch, dim).

    Attributes:
        mode: ``mean``, ``cls``, ``max`` or ``lasttoken``, each over the unmasked tokens only.
        normalize: divide by the Euclidean norm afterwards.
        declared: the checkpoint says so; False when this is only the default for a plain encoder.
    """

    mode: str
    normalize: bool
    declared: bool


@dataclass(frozen=True)
class SentenceFolder:
    """What ``modules.json`` says: where the Transformer lies, its pooling, and its own length limit."""

    root: Path
    pooling: Pooling
    max_tokens: int | None
    lowercase: bool
    prompt: str


def read_sentence_folder(folder: Path) -> SentenceFolder | None:
    """Read a sentence-transformers folder; None when the folder has no ``modules.json``.

    Raises:
        CheckpointError: unreadable files, paths that leave the folder, or a module other than Transformer,
            Pooling and Normalize (a Dense layer, for instance), because the embedding would be wrong.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = [_module(folder, entry) for entry in read_json(folder / "modules.json", list)]
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or any(kind != "Normalize" for kind in kinds[2:]):
        raise CheckpointError(
            f"modules.json asks for {' + '.join(kinds) or 'nothing'}; only Transformer + Pooling, optionally "
            "followed by Normalize, can be compressed.",
            "Use a sentence encoder without further layers.",
        )
    root = modules[0][1]
    limits = _optional(root / "sentence_bert_config.json")
    max_tokens = limits.get("max_seq_length")
    return SentenceFolder(
        root=root,
        pooling=Pooling(
            _mode(read_json(modules[1][1] / "config.json", dict)), "Normalize" in kinds, declared=True
        ),
        max_tokens=max_tokens if isinstance(max_tokens, int) and max_tokens > 0 else None,
        lowercase=limits.get("do_lower_case") is True,
        prompt=_default_prompt(_optional(folder / "config_sentence_transformers.json")),
    )


def read_json(path: Path, kind: type) -> Any:
    """The JSON value of a file, which must be of the given Python type (dict or list)."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path.name} of the checkpoint cannot be read.", "Copy the folder again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON.", "Copy the checkpoint again.") from error
    if not isinstance(value, kind):
        raise CheckpointError(
            f"{path.name} does not hold a JSON {kind.__name__}.", "Copy the checkpoint again."
        )
    return value


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path, dict) if path.is_file() else {}


def _module(folder: Path, entry: object) -> tuple[str, Path]:
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        raise CheckpointError("modules.json holds an entry without a type.", "Copy the checkpoint again.")
    relative = Path(str(entry.get("path") or ""))
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(
            f"modules.json points to {str(relative)!r}, outside the checkpoint folder.",
            "Use a checkpoint whose modules lie in its own folder.",
        )
    return entry["type"].rsplit(".", 1)[-1], folder / relative


def _mode(config: dict[str, Any]) -> str:
    """The single pooling mode; newer files name it, older ones set one flag of several."""
    named = config.get("pooling_mode")
    if named is not None:
        chosen = [str(mode) for mode in (named if isinstance(named, list) else [named])]
    else:
        flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        chosen = [_FLAGS.get(flag, flag.removeprefix("pooling_mode_")) for flag in flags]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise CheckpointError(
            f"The checkpoint pools with {' + '.join(chosen) or 'no mode'}, which cannot be put into a graph.",
            f"Use a sentence encoder with one of these poolings: {', '.join(_MODES)}.",
        )
    return chosen[0]


def _default_prompt(config: dict[str, Any]) -> str:
    prompts, name = config.get("prompts"), config.get("default_prompt_name")
    return str(prompts.get(name, "")) if isinstance(prompts, dict) and name is not None else ""
