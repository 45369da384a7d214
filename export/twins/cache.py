"""The key-value cache as graph inputs and outputs, behind the protocol that transformers' models use."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers.cache_utils import EncoderDecoderCache

Pair = tuple[torch.Tensor, torch.Tensor]


class GraphCache:
    """Past tensors come in, present tensors go out; one (key, value) pair a layer, (batch, heads, past, dim).

    shared: the attention operator appends to the past, so ``update`` hands the new keys and values through;
    otherwise the past is concatenated here. position: where the new tokens begin, for models that ask the
    cache instead of being told; the length of a shared buffer is its capacity and says nothing about it.
    """

    is_compileable = False

    def __init__(
        self,
        past: Sequence[Pair],
        *,
        shared: bool,
        seqlens: torch.Tensor | None = None,
        total: torch.Tensor | None = None,
        position: torch.Tensor | None = None,
    ) -> None:
        self.past = list(past)
        self.shared = shared
        self.seqlens, self.total, self.position = seqlens, total, position
        self.present: list[Pair | None] = [None] * len(self.past)
        self.is_sliding = self.is_linear = self.is_dummy = [False] * len(self.past)
        self.updated: int | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.updated = layer_idx
        if self.shared:
            return keys, values
        past_keys, past_values = self.past[layer_idx]
        pair = torch.cat([past_keys, keys], 2), torch.cat([past_values, values], 2)
        self.present[layer_idx] = pair
        return pair

    def take_updated(self) -> int | None:
        """The layer whose update came just before this attention call, once; None outside cached
        attention."""
        layer, self.updated = self.updated, None
        return layer

    @property
    def past_length(self) -> int | torch.SymInt:
        return self.past[0][0].shape[2]

    def __len__(self) -> int:
        return len(self.past)

    def get_seq_length(self, *_args: Any) -> int | torch.SymInt | torch.Tensor:
        return self.past_length if self.position is None else self.position

    def get_query_offset(self, *_args: Any) -> int | torch.SymInt:
        return self.past_length

    def get_mask_sizes(self, query_length: int, *_args: Any) -> tuple[int | torch.SymInt, int]:
        return self.past_length + query_length, 0

    def get_max_cache_shape(self, *_args: Any) -> int:
        return -1


class CrossCache:
    """Keys and values of the encoder's vectors, (batch, heads, source, dim) a layer.

    Empty, it records what the decoder's cross attention makes of the encoder's output; filled, it hands that
    out again, so that the decoder's graph never sees the encoder.
    """

    def __init__(self, pairs: Sequence[Pair] = ()) -> None:
        self.layers = [SimpleNamespace(keys=keys, values=values) for keys, values in pairs]
        self.recorded: dict[int, Pair] = {}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.recorded[layer_idx] = (keys, values)
        return keys, values

    def holds(self, keys: torch.Tensor) -> bool:
        """Whether these are keys of the encoder's vectors, as they came into the graph."""
        return any(keys is layer.keys for layer in self.layers)


class GraphEncoderDecoderCache(EncoderDecoderCache):
    """The pair of caches a model's decoder asks for; the parent's constructor insists on its own kinds."""

    def __init__(self, own: Any, cross: CrossCache) -> None:
        self.self_attention_cache, self.cross_attention_cache = own, cross
        self.is_updated = dict.fromkeys(range(len(cross.layers)), True)
