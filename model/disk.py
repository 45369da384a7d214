"""Weights in files instead of memory, for models that would not fit.

    with room_for(folder, limit=6e9):
        checkpoint = load_checkpoint("llama-3b")  # 12 GB in float32, mapped from files in the folder
        weight = kept(weight)                     # so is what is made in their size, while the block runs

The system may drop pages of a mapped file that nobody has changed and read them again, so such weights take
memory only as long as there is some to spare. Files go as soon as they are mapped: their bytes stay until the
last tensor over them is gone, and nothing is left behind by a process that is killed.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gemini.errors import UsageError
from gemini.model.safetensors_check import INDEX_FILE, TensorTable, read_header

if TYPE_CHECKING:
    from torch import Tensor, nn

# What compressing takes beside weights: the libraries, a batch's activations, the statistics of a block.
WORKING = 1_500_000_000
# Float32 weights that are there at once: the model's own, and those of a quantized one that is run in torch.
_COPIES = 2
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"}
_BESIDE = ("config.json", "generation_config.json", INDEX_FILE)
_SMALLEST = 1 << 20  # bytes; a file of its own costs a page and a mapping


@dataclass
class Room:
    """How many bytes may be held (None: any), how many would be, and whether weights went to files."""

    folder: Path
    limit: float | None
    needed: float = 0.0
    used: bool = False

    def fits(self, elements: int) -> bool:
        """Whether so many weights may be in memory."""
        self.needed = max(self.needed, WORKING + 4.0 * _COPIES * elements)
        self.used = self.used or (self.limit is not None and self.needed > self.limit)
        return not self.used

    def to_dict(self) -> dict[str, Any]:
        """Megabytes (10^6 bytes), for a report."""
        limit = None if self.limit is None else round(self.limit / 1e6)
        return {"limit_mb": limit, "needed_mb": round(self.needed / 1e6), "weights_on_disk": self.used}


_ROOM: ContextVar[Room | None] = ContextVar("room", default=None)


@contextlib.contextmanager
def room_for(beside: Path, limit: float | None) -> Iterator[Room]:
    """Inside the block, weights that do not fit into ``limit`` bytes are read from files beside a path.

    Beside it, because a system's own folder for such files is often held in memory. None: everything fits.
    UsageError if the limit is less than what compressing takes without any weights.
    """
    if limit is not None and not limit >= WORKING:
        raise UsageError(
            f"{limit / 1e9:g} GB are too little memory.",
            f"Allow {WORKING / 1e9:g} GB or more: so much is taken beside the weights.",
        )
    with tempfile.TemporaryDirectory(
        prefix=f".{beside.name}.", suffix=".weights", dir=beside.parent, ignore_cleanup_errors=True
    ) as folder:
        room = Room(Path(folder), limit)
        token = _ROOM.set(room)
        try:
            yield room
        finally:
            _ROOM.reset(token)


def kept(tensor: Tensor) -> Tensor:
    """The tensor, or one of the same numbers over a file where weights do not fit into memory."""
    room = _ROOM.get()
    if room is None or not room.used or tensor.nbytes < _SMALLEST:
        return tensor
    with tempfile.NamedTemporaryFile(dir=room.folder, delete=False) as file:
        # Written before it is mapped: on a full disk a write fails, touching a mapped page would kill.
        tensor.detach().contiguous().numpy().tofile(file)
        path = Path(file.name)
    import torch

    mapped = torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype)
    _forget(path)
    return mapped.view(tensor.shape)


@contextlib.contextmanager
def as_float32(root: Path, table: TensorTable) -> Iterator[Path]:
    """A folder whose weights can be mapped as float32: the given one, or a copy where they would not fit.

    Float32 files are mapped where they lie. Others are read tensor by tensor and written as float32, with the
    configuration beside them; once the block ends only what has been mapped of them remains.
    """
    room = _ROOM.get()
    if room is None or room.fits(table.elements) or not (table.dtypes & _FLOATS) - {"F32"}:
        yield root
        return
    folder = Path(tempfile.mkdtemp(dir=room.folder))
    for name in _BESIDE:
        if (root / name).is_file():
            shutil.copyfile(root / name, folder / name)
    copies = [folder / path.name for path in table.files]
    try:
        for path, copy in zip(table.files, copies, strict=True):
            _write_float32(path, copy)
        yield folder
    finally:
        for copy in copies:
            _forget(copy)


def settle(model: nn.Module, elements: int) -> None:
    """Move a model to files that is in memory already and does not fit."""
    room = _ROOM.get()
    if room is not None and not room.fits(elements):
        for parameter in model.parameters():  # a tied one comes once
            parameter.data = kept(parameter.data)


def _write_float32(source: Path, target: Path) -> None:
    """The tensors of a safetensors file as float32, integers as they are, in their order."""
    from safetensors import safe_open

    header = read_header(source)
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    entries: dict[str, Any] = {}
    position = 0
    for name in names:
        begin, end = header[name]["data_offsets"]
        entry, size = header[name], end - begin
        if entry["dtype"] in _FLOATS:
            entry, size = {**entry, "dtype": "F32"}, 4 * math.prod(entry["shape"])
        entries[name] = {**entry, "data_offsets": [position, position + size]}
        position += size
    described = json.dumps(entries).encode()
    described += b" " * (-len(described) % 8)  # so that float32 data begin at a multiple of 8
    with safe_open(source, framework="pt") as tensors, target.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for name in tqdm(names, desc="to float32", unit="tensor", delay=2, leave=False, disable=None):
            tensor = tensors.get_tensor(name)
            (tensor.float() if tensor.is_floating_point() else tensor).numpy().tofile(file)


def _forget(path: Path) -> None:
    """Remove a mapped file; where a system does not allow that, it goes with its folder."""
    with contextlib.suppress(PermissionError, FileNotFoundError):
        path.unlink()
