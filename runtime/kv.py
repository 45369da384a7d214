"""Key/value buffers of a decoder: allocation on a device, growth, and their names in the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from gemini.errors import RequestError
from gemini.runtime.schema import LayerShape

BLOCK = 64  # capacities are multiples of this many tokens, so that growing by one token rarely copies
_ALIGNED = 64  # elements: every buffer begins on a cache line


def cache_names(layers: Sequence[LayerShape]) -> list[tuple[str, str]]:
    """(graph input, graph output) of every cache tensor, in the order of :func:`allocate`."""
    return [
        (f"past.{index}.{kind}", f"present.{index}.{kind}")
        for index in range(len(layers))
        for kind in ("key", "value")
    ]


def round_up(tokens: int, limit: int) -> int:
    """The capacity for ``tokens``: the next multiple of BLOCK, but not above ``limit`` unless tokens is."""
    return max(tokens, min(-(-tokens // BLOCK) * BLOCK, limit))


def allocate(
    layers: Sequence[LayerShape], batch: int, capacity: int, device: str, dtype: type[np.number]
) -> list[ort.OrtValue]:
    """Zeroed key and value buffers (batch, kv_heads, capacity, dim) of every layer, on ``device``.

    They lie in one piece of memory: numpy puts large arrays on huge pages, and a step walks through them all.
    """
    shapes = [
        (batch, layer.kv_heads, capacity, dim) for layer in layers for dim in (layer.key_dim, layer.value_dim)
    ]
    sizes = [-(-math.prod(shape) // _ALIGNED) * _ALIGNED for shape in shapes]
    pool, starts = np.zeros(sum(sizes), dtype), np.cumsum([0, *sizes])
    return [
        to_device(pool[start : start + math.prod(shape)].reshape(shape), device)
        for start, shape in zip(starts, shapes, strict=False)
    ]


def copy(values: Sequence[ort.OrtValue], larger: Sequence[ort.OrtValue], used: int) -> None:
    """Let larger buffers begin with the first ``used`` tokens of others.

    Device buffers pass through host memory: onnxruntime copies whole tensors only, and growth is rare.
    """
    for old, new in zip(values, larger, strict=True):
        tokens = old.numpy()[:, :, :used]
        if new.device_name() == "cpu":
            new.numpy()[:, :, :used] = tokens
        else:
            whole = np.zeros(new.shape(), tokens.dtype)
            whole[:, :, :used] = tokens
            new.update_inplace(whole)


def to_device(array: np.ndarray, device: str) -> ort.OrtValue:
    """An OrtValue for ``array``: on the CPU it shares the array's memory, elsewhere it is a copy."""
    return ort.OrtValue.ortvalue_from_numpy(array, "cuda" if device == "cuda" else "cpu", 0)


def too_large(batch: int, tokens: int) -> RequestError:
    return RequestError(
        f"There is not enough memory for a cache of {batch} x {tokens} tokens.",
        "Use fewer prompts or fewer tokens.",
    )
