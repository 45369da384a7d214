"""Checks of safetensors files before anything maps them: header, offsets, sizes, and the shard index.

The format (huggingface/safetensors, README "Format"): 8 bytes little-endian header length N, N bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``, then the data without holes up to the end.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from gemini.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The reference reader refuses longer headers too; it bounds what a hostile length can make us read.
MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
_REMEDY = "Copy or download the file again."


@dataclass(frozen=True)
class TensorTable:
    """What the checked files hold: their paths, the tensor names and types, the number of elements in all."""

    files: tuple[Path, ...]
    names: frozenset[str]
    dtypes: frozenset[str]
    elements: int


def check_weights(folder: Path) -> TensorTable:
    """Check the weights of a folder, one file or indexed shards, and return their table.

    Raises:
        CheckpointError: a file is truncated or malformed, a shard is missing, or the index leaves the folder.
    """
    if (folder / SINGLE_FILE).is_file():
        return _merge([(folder / SINGLE_FILE, read_header(folder / SINGLE_FILE))])
    tables = []
    for shard, expected in sorted(_read_index(folder).items()):
        path = folder / shard
        if not path.is_file():
            raise CheckpointError(f"The weight file {shard} named by {INDEX_FILE} is missing.", _REMEDY)
        header = read_header(path)
        absent = sorted(expected - header.keys())
        if absent:
            raise CheckpointError(
                f"{shard} lacks {len(absent)} tensors that {INDEX_FILE} promises, such as {absent[0]!r}.",
                _REMEDY,
            )
        tables.append((path, header))
    return _merge(tables)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read and check the header of one safetensors file; returns ``{tensor name: entry}``.

    Raises:
        CheckpointError: with the file's name, for every way in which the file departs from the format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length < 2:
            raise _damaged(path, f"it has {size} bytes and no header")
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise _damaged(path, f"its header claims {length} bytes and the file has {size}")
        raw = file.read(length)
    header = _parse(path, raw)
    header.pop("__metadata__", None)
    spans = sorted((_check_entry(path, name, entry), name) for name, entry in header.items())
    position = 0
    for (begin, end), name in spans:
        if begin != position:
            raise _damaged(path, f"tensor {name!r} starts at byte {begin} of the data and not at {position}")
        position = end
    if 8 + length + position != size:
        raise _damaged(path, f"its tensors need {8 + length + position} bytes and the file has {size}")
    return header


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _check_entry(path: Path, name: str, entry: object) -> tuple[int, int]:
    if not isinstance(entry, dict):
        raise _damaged(path, f"the header entry of {name!r} is not an object")
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if dtype not in _ITEM_BYTES:
        raise _damaged(path, f"tensor {name!r} has the unknown type {dtype!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"the shape or the offsets of {name!r} are not lists of counts")
    begin, end = offsets
    needed = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != needed:
        raise _damaged(path, f"tensor {name!r} needs {needed} bytes and has {end - begin}")
    return begin, end


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    # bool is an int in Python, but `true` is no count in JSON.
    return isinstance(value, list) and all(
        isinstance(item, int) and item is not True and item >= 0 for item in value
    )


def _read_index(folder: Path) -> dict[str, set[str]]:
    """``{shard file name: its tensor names}`` from the index file."""
    try:
        weight_map = json.loads((folder / INDEX_FILE).read_text("utf-8"))["weight_map"]
        pairs = [(str(shard), str(name)) for name, shard in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{INDEX_FILE} is not a readable index of weight files.", _REMEDY) from error
    shards: dict[str, set[str]] = {}
    for shard, name in pairs:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{INDEX_FILE} names {shard!r}, which is not a .safetensors file inside the folder.",
                "Use a checkpoint whose index names files of its own folder.",
            )
        shards.setdefault(shard, set()).add(name)
    if not shards:
        raise CheckpointError(f"{INDEX_FILE} names no weights.", _REMEDY)
    return shards


def _merge(tables: list[tuple[Path, dict[str, dict[str, Any]]]]) -> TensorTable:
    return TensorTable(
        files=tuple(path for path, _ in tables),
        names=frozenset(name for _, header in tables for name in header),
        dtypes=frozenset(entry["dtype"] for _, header in tables for entry in header.values()),
        elements=sum(math.prod(entry["shape"]) for _, header in tables for entry in header.values()),
    )


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"The weight file {path.name} is truncated or corrupt: {reason}.", _REMEDY)
