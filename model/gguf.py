"""GGUF files: a bounds-checked walk over the header before any reader maps the tensors.

Format: ggml-org/ggml docs/gguf.md, versions 2 and 3, little-endian: magic, version, tensor count, metadata
count, metadata pairs, tensor table (name, dimensions, type, offset), padding to the alignment, data.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini.errors import CheckpointError
from gemini.model.weights import Stored

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SMALLEST_PAIR = 8 + 1 + 4 + 1  # key length, one letter, value type, one byte
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # name length, one letter, rank, one dimension, type, offset
_MAX_RANK = 4  # GGML_MAX_DIMS
_KEPT_ARRAY = 64  # longer arrays (the vocabulary) are walked, and kept as their length only
_REMEDY = "Copy or download the file again."


@dataclass(frozen=True)
class GgufHeader:
    """What the checked header says.

    Attributes:
        metadata: key to scalar, string or short list; a long array is represented by its length.
        shapes: tensor name to dimensions, fastest first (as ggml counts them).
    """

    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def stored(self) -> Stored:
        """Number of tensors and elements."""
        return Stored(len(self.shapes), sum(math.prod(shape) for shape in self.shapes.values()))


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Cursor:
    """Reads values in order and refuses to step over the end of the file."""

    def __init__(self, data: "mmap.mmap | bytes", name: str) -> None:
        self.data, self.name, self.position, self.size = data, name, 0, len(data)

    def damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"The GGUF file {self.name} is truncated or corrupt: {reason}.", _REMEDY)

    def claim(self, count: int) -> int:
        """Move ``count`` bytes forward; returns where they start."""
        start = self.position
        if count > self.size - start:
            raise self.damaged(f"its header needs {count} more bytes at {start} of {self.size}")
        self.position = start + count
        return start

    def values(self, form: str) -> tuple[Any, ...]:
        layout = struct.Struct("<" + form)
        return layout.unpack_from(self.data, self.claim(layout.size))

    def text(self) -> str:
        (length,) = self.values("Q")
        start = self.claim(length)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"the text at byte {start} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.values(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(*self.values("IQ"))
        raise self.damaged(f"it holds a value of the unknown type {kind}")

    def _array(self, kind: int, count: int) -> Any:
        if kind == _STRING:
            if count * 8 > self.size - self.position:
                raise self.damaged(f"it promises {count} texts")
            texts = [self.text() for _ in range(count)]
            return texts if count <= _KEPT_ARRAY else count
        if kind not in _SCALARS:
            raise self.damaged(f"it holds an array of type {kind}")
        start = self.claim(count * struct.calcsize("<" + _SCALARS[kind]))
        if count > _KEPT_ARRAY:
            return count
        return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, start))


def check_gguf(path: Path) -> GgufHeader:
    """Walk the whole header of a GGUF file and check that every tensor lies inside the file.

    Raises:
        CheckpointError: not a GGUF, an unsupported version or byte order, truncated, or inconsistent.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(
                f"{path.name} is not a GGUF file.", "Pass a .gguf file or a checkpoint folder."
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _walk(_Cursor(data, path.name))


def _walk(cursor: _Cursor) -> GgufHeader:
    cursor.claim(4)
    version, tensor_count, pair_count = cursor.values("IQQ")
    if version not in (2, 3):
        kind = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise CheckpointError(
            f"The GGUF file {cursor.name} is {kind}; little-endian versions 2 and 3 can be read.",
            "Convert it again with a current llama.cpp.",
        )
    if pair_count * _SMALLEST_PAIR + tensor_count * _SMALLEST_TENSOR > cursor.size:
        raise cursor.damaged(f"it promises {tensor_count} tensors and {pair_count} metadata pairs")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.text()
        if key in metadata:
            raise cursor.damaged(f"the key {key!r} occurs twice")
        metadata[key] = cursor.value(*cursor.values("I"))
    tensors = [_tensor(cursor) for _ in range(tensor_count)]
    _check_places(cursor, metadata, tensors)
    header = GgufHeader(metadata, {tensor.name: tensor.shape for tensor in tensors})
    if len(header.shapes) != tensor_count:
        raise cursor.damaged("a tensor name occurs twice")
    _check_hyperparameters(cursor, header)
    return header


def _tensor(cursor: _Cursor) -> _Tensor:
    name = cursor.text()
    (rank,) = cursor.values("I")
    if not 1 <= rank <= _MAX_RANK:
        raise cursor.damaged(f"tensor {name!r} has {rank} dimensions")
    shape = cursor.values(f"{rank}Q")
    return _Tensor(name, shape, *cursor.values("IQ"))


def _check_places(cursor: _Cursor, metadata: dict[str, Any], tensors: list[_Tensor]) -> None:
    """Every tensor has a known type, is aligned, lies inside the file and overlaps no other."""
    from gguf import GGML_QUANT_SIZES

    sizes = {int(kind): layout for kind, layout in GGML_QUANT_SIZES.items()}
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > 2**20:
        raise cursor.damaged(f"its alignment is {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    end, last = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.kind not in sizes:
            raise CheckpointError(
                f"Tensor {tensor.name!r} of {cursor.name} has the type {tensor.kind}, unknown to gguf.",
                "Update gguf, or convert the model to a common type such as Q8_0.",
            )
        block, block_bytes = sizes[tensor.kind]
        if tensor.offset % alignment or tensor.shape[0] % block or not all(tensor.shape):
            raise cursor.damaged(f"tensor {tensor.name!r} has a crooked offset or shape")
        if tensor.offset < end:
            raise cursor.damaged(f"the tensors {last!r} and {tensor.name!r} overlap")
        end, last = tensor.offset + math.prod(tensor.shape) // block * block_bytes, tensor.name
        if data_start + end > cursor.size:
            raise cursor.damaged(
                f"tensor {tensor.name!r} ends at byte {data_start + end} and the file has {cursor.size}"
            )


def _check_hyperparameters(cursor: _Cursor, header: GgufHeader) -> None:
    """The counts that decide how much a reader allocates must agree with the tensors that are there."""
    name = header.metadata.get("general.architecture")
    table = header.shapes.get("token_embd.weight")
    if not isinstance(name, str) or not name or table is None or len(table) != 2:
        raise CheckpointError(
            f"The GGUF file {cursor.name} names no architecture or has no token embedding.",
            "Pass the GGUF of a whole language model, not a part, an adapter or a vocabulary.",
        )
    layers = header.metadata.get(f"{name}.block_count", 0)
    if not isinstance(layers, int) or layers > len(header.shapes):
        raise cursor.damaged(f"it claims {layers} layers and holds {len(header.shapes)} tensors")
    width = header.metadata.get(f"{name}.embedding_length", table[0])
    if width != table[0]:
        raise cursor.damaged(f"it claims a width of {width} and its embedding has {table[0]}")
