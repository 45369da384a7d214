"""Logits at every position, for evaluation; generation computes only the last one of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemini.errors import RequestError
from gemini.runtime import kv
from gemini.runtime.checks import cache_dtype, checked_rows
from gemini.runtime.schema import DecoderModel
from gemini.runtime.session import Graph, run_graph


def split_window(
    ids: NDArray[np.int64], prefix: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A window (1, S) as a source, ``prefix`` in front of its first half, and the rest as the answer."""
    half = ids.shape[1] // 2
    return np.concatenate([np.array([prefix], np.int64).reshape(1, -1), ids[:, :half]], 1), ids[:, half:]


def all_logits(
    graph: Graph,
    model: DecoderModel,
    ids: ArrayLike,
    lengths: ArrayLike | None = None,
    constants: Mapping[str, np.ndarray] | None = None,
) -> NDArray[np.float32]:
    """Logits (B, S, V) at every position of ``ids`` (B, S), without touching any running batch.

    ``lengths`` (B,) says how many leading tokens of each row are real; logits after them are meaningless
    (zeros for a "concat" cache, which runs such rows one by one). ``constants`` are further inputs of the
    graph, for rows of equal length.
    """
    rows = checked_rows(ids, model)
    if len({row.size for row in rows}) != 1:
        raise RequestError("The rows of token ids differ in length.", "Pad them and pass lengths.")
    tokens = np.stack(rows)
    batch, width = tokens.shape
    valid = np.full(batch, width) if lengths is None else np.asarray(lengths)
    if valid.shape != (batch,) or valid.dtype.kind not in "iu" or (valid < 1).any() or (valid > width).any():
        raise RequestError("lengths does not fit the token ids.", f"Give {batch} integers from 1 to {width}.")
    if model.cache == "concat" and batch > 1 and (valid != width).any():
        result = np.zeros((batch, width, model.vocab_size), np.float32)
        for row, count in enumerate(valid.tolist()):
            result[row, :count] = all_logits(graph, model, tokens[row : row + 1, :count])[0]
        return result
    empty = kv.allocate(model.layers, batch, 0, "cpu", cache_dtype(graph))
    feeds = {
        **(constants or {}),
        "input_ids": tokens,
        "seqlens_k": (valid - 1).astype(np.int32),
        "total_sequence_length": np.array(width, np.int32),
        "logit_positions": np.broadcast_to(np.arange(width), (batch, width)).copy(),
        **{past: value.numpy() for (past, _), value in zip(kv.cache_names(model.layers), empty, strict=True)},
    }
    return run_graph(graph, "logits", {name: feeds[name] for name in graph.inputs})
