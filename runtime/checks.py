"""Checks of a decoder: token ids that come in, and the graph against its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemini.errors import BundleError, RequestError
from gemini.runtime import kv
from gemini.runtime.schema import DecoderModel, EncoderDecoderModel, LayerShape
from gemini.runtime.session import Graph, require

FLOATS: dict[str, type[np.number]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
CACHE_DTYPES = {**FLOATS, "tensor(int8)": np.int8}  # what keys and values of past tokens may be stored as
LENGTH_INPUTS = ("seqlens_k", "total_sequence_length")  # a graph that does not need them has lost them


def checked_row(tokens: ArrayLike, vocab_size: int) -> NDArray[np.int64]:
    """One row of token ids as int64 (n,). RequestError unless all are integers in [0, vocab_size).

    The graph would not notice: GatherBlockQuantized returns zeros for an id out of range.
    """
    try:
        row = np.asarray(tokens)
    except (ValueError, OverflowError):
        row = np.zeros(0)
    if row.ndim != 1 or row.dtype.kind not in "iu" or row.size == 0:
        raise RequestError("The token ids are not a non-empty row of integers.", "Give a list of token ids.")
    if row.min() < 0 or row.max() >= vocab_size:
        raise RequestError(
            f"A token id lies outside 0..{vocab_size - 1}.",
            "Encode the text with the bundle's own tokenizer.",
        )
    return row.astype(np.int64)


def checked_rows(
    ids: ArrayLike | Sequence[Sequence[int]], model: DecoderModel | EncoderDecoderModel
) -> list[NDArray[np.int64]]:
    """The rows of a batch, each checked; RequestError for none at all or one over the context length."""
    rows = (
        [checked_row(row, model.vocab_size or 0) for row in ids]
        if isinstance(ids, (list, tuple, np.ndarray))
        else []
    )
    if not rows:
        raise RequestError("The batch is empty.", "Give at least one row of token ids.")
    longest = max(row.size for row in rows)
    if longest > model.context_length:
        raise RequestError(
            f"A prompt has {longest} tokens and the model's context holds {model.context_length}.",
            "Shorten the prompt.",
        )
    return rows


def check_graph(graph: Graph, model: DecoderModel, cross: Sequence[LayerShape] = ()) -> None:
    """BundleError unless the graph's inputs, outputs and fixed dimensions are those the manifest states.

    ``cross``: of a decoder with an encoder, what it also takes.
    """
    names = kv.cache_names(model.layers)
    past, present = [p for p, _ in names], [p for _, p in names]
    further = cross_names(cross)
    require(
        graph,
        ["input_ids", "logit_positions", *past, *further],
        ["logits", *present],
        (*LENGTH_INPUTS, "cross_mask"),
    )
    check_shapes(graph, {"logits": {2: model.vocab_size}, **_cache_sizes("cross", cross)})
    check_shapes(graph, _cache_sizes("past", model.layers), CACHE_DTYPES)


def cross_names(cross: Sequence[LayerShape]) -> list[str]:
    """What the encoder's graph returns, beside the mask, and the decoder's takes."""
    return [f"cross.{index}.{part}" for index in range(len(cross)) for part in ("key", "value")]


def check_encoder(graph: Graph, model: EncoderDecoderModel) -> None:
    """BundleError unless the encoder's graph makes what the decoder's takes."""
    require(graph, model.inputs, ["cross_mask", *cross_names(model.cross)])
    check_shapes(graph, _cache_sizes("cross", model.cross))


def _cache_sizes(prefix: str, layers: Sequence[LayerShape]) -> dict[str, dict[int, int]]:
    sizes: dict[str, dict[int, int]] = {}
    for index, layer in enumerate(layers):
        sizes[f"{prefix}.{index}.key"] = {1: layer.kv_heads, 3: layer.key_dim}
        sizes[f"{prefix}.{index}.value"] = {1: layer.kv_heads, 3: layer.value_dim}
    return sizes


def cache_dtype(graph: Graph) -> type[np.number]:
    """What a checked decoder's graph stores past keys and values as."""
    return CACHE_DTYPES[graph.inputs["past.0.key"][0]]


def check_shapes(
    graph: Graph,
    expected: Mapping[str, Mapping[int, int]],
    dtypes: Mapping[str, type[np.number]] = FLOATS,
) -> None:
    """BundleError unless these values have a type of ``dtypes`` and these sizes, {name: {axis: size}}, the
    last axis given."""
    for name, sizes in expected.items():
        dtype, shape = {**graph.inputs, **graph.outputs}[name]
        fits = dtype in dtypes and len(shape) == max(sizes) + 1
        if not fits or any(isinstance(shape[axis], int) and shape[axis] != n for axis, n in sizes.items()):
            raise BundleError(
                f"The graph's {name} (type {dtype}, shape {list(shape)}) is not what the manifest says.",
                "Compress the model again.",
            )
