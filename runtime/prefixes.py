"""Keys and values of earlier prompts, kept so that what two requests begin with is computed once.

    generator.keep_prefixes(256 * 2**20)          # bytes; the least recently used go first
    generator.generate(system + question)         # computes all of it
    generator.generate(system + other)            # computes what follows the longest common beginning
    generator.save_prefixes("system.prefixes")    # another process: restore_prefixes

What is reused was computed by the same model from the same tokens, but perhaps in calls of other lengths,
whose kernels round differently in the last bits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemini.errors import BundleError, RequestError
from gemini.runtime.schema import DecoderModel

_FORMAT = "gemini-edge prefixes 1"
_REMEDY = "Save the prefixes again with this bundle."


@dataclass(frozen=True)
class Prefix:
    """Token ids int64 (n,), and the cache of each layer: key, value, key, ... as (kv_heads, n, dim)."""

    tokens: NDArray[np.int64]
    values: tuple[np.ndarray, ...]

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + sum(value.nbytes for value in self.values)


class PrefixCache:
    """Prefixes up to ``limit`` bytes, the least recently used first in line to go. Safe between threads."""

    def __init__(self, limit: int) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise RequestError(f"The limit of {limit!r} bytes is not an integer.", "Give 0 or more bytes.")
        self.limit = limit
        self._lock = threading.Lock()
        self._held: list[Prefix] = []  # the most recently used last

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self.held())

    def held(self) -> list[Prefix]:
        """All prefixes, the least recently used first."""
        with self._lock:
            return list(self._held)

    def longest(self, tokens: NDArray[np.int64]) -> tuple[int, Prefix] | None:
        """The prefix that shares the most leading ``tokens``, and how many; None where not even one is."""
        with self._lock:
            best = max(self._held, key=lambda prefix: common(prefix.tokens, tokens), default=None)
            if best is None or not (count := common(best.tokens, tokens)):
                return None
            self._held = [prefix for prefix in self._held if prefix is not best] + [best]
            return count, best

    def keep(self, new: Prefix) -> None:
        """Hold a prefix, unless it is larger than the limit or a longer one begins with it; those that it
        continues are dropped."""
        with self._lock:
            if new.nbytes > self.limit:
                return
            shared = [common(prefix.tokens, new.tokens) for prefix in self._held]
            if any(
                new.tokens.size == count < prefix.tokens.size
                for prefix, count in zip(self._held, shared, strict=True)
            ):
                return
            rest = [
                prefix for prefix, count in zip(self._held, shared, strict=True) if count < prefix.tokens.size
            ]
            room = self.limit - new.nbytes
            kept: list[Prefix] = []
            for prefix in reversed(rest):
                room -= prefix.nbytes
                if room < 0:
                    break
                kept.append(prefix)
            self._held = [*reversed(kept), new]


def common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """The length of the longest common beginning."""
    size = min(first.size, second.size)
    differ = np.flatnonzero(first[:size] != second[:size])
    return int(differ[0]) if differ.size else size


def save(path: str | Path, prefixes: Sequence[Prefix], digest: str) -> None:
    """Write prefixes of the bundle ``digest`` to a file, whole or not at all."""
    import tempfile  # 10 ms of every start, for what few sessions do

    target = Path(path)
    arrays: dict[str, np.ndarray] = {"format": np.array(_FORMAT), "bundle": np.array(digest)}
    for index, prefix in enumerate(prefixes):
        arrays[f"{index}.tokens"] = prefix.tokens
        arrays |= {f"{index}.{layer}": value for layer, value in enumerate(prefix.values)}
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def read(path: str | Path, digest: str, model: DecoderModel, dtype: type[np.number]) -> list[Prefix]:
    """The prefixes of a file; BundleError if it is damaged, no such file, or of another bundle."""
    import zipfile

    try:
        arrays = _read_arrays(path)
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} holds no prefixes, or is damaged ({error}).", _REMEDY) from error
    if str(arrays.get("format")) != _FORMAT:
        raise BundleError(f"{path} holds no prefixes.", _REMEDY)
    if str(arrays.get("bundle")) != digest:
        raise BundleError(f"The prefixes in {path} are of another bundle.", _REMEDY)
    sizes = [(layer.kv_heads, dim) for layer in model.layers for dim in (layer.key_dim, layer.value_dim)]
    count, rest = divmod(len(arrays) - 2, len(sizes) + 1)
    found = []
    for index in range(count):
        tokens = arrays.get(f"{index}.tokens", np.zeros(0))
        values = tuple(arrays.get(f"{index}.{layer}", np.zeros(0)) for layer in range(len(sizes)))
        shapes = [(heads, tokens.size, dim) for heads, dim in sizes]
        fits = tokens.ndim == 1 and tokens.dtype == np.int64 and 0 < tokens.size <= model.context_length
        if not fits or [v.shape for v in values] != shapes or any(v.dtype != dtype for v in values):
            rest = 1
        found.append(Prefix(tokens, values))
    if rest:
        raise BundleError(f"The prefixes in {path} do not fit the model.", _REMEDY)
    return found


def _read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The members of an .npz file, each checked against its checksum; nothing is unpickled or unpacked."""
    import zipfile

    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError("a member is compressed")
            with archive.open(info) as member:
                arrays[info.filename.removesuffix(".npy")] = np.lib.format.read_array(
                    member, allow_pickle=False
                )
                if member.read(1):  # the checksum is compared at the end
                    raise ValueError("a member is too long")
    return arrays
