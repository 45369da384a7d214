"""The graphs of each family: a module to trace, its example inputs and its dynamic axes.

Shapes and names are the contract with the runtime; they are written down in docs/bundle.md.
Examples use sizes of two and more, because torch.export specialises on 0 and 1; the graphs run with those
too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from gemini.errors import ExportError
from gemini.export.trace_state import TraceState
from gemini.export.twins.cache import GraphCache, Pair
from gemini.export.twins.head import gather_positions
from gemini.model.checkpoint import Checkpoint
from gemini.model.vision import sample_pixels
from gemini.runtime.schema import LayerShape


@dataclass(frozen=True)
class Graph:
    """One graph to be traced."""

    name: str
    module: nn.Module
    inputs: dict[str, Any]
    dynamic_shapes: tuple[Any, ...]
    input_names: list[str]
    output_names: list[str]


class DecoderGraph(nn.Module):
    """One call of a causal language model: prefill, a decode step, or a chunk of one sequence."""

    def __init__(self, model: nn.Module, state: TraceState, head_picks: bool) -> None:
        super().__init__()
        self.model, self.state, self.head_picks = model, state, head_picks
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self,
        input_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        logit_positions: torch.Tensor,
        past: list[Pair],
    ) -> tuple[torch.Tensor, list[Pair | None]]:
        state = self.state
        cache = GraphCache(
            past, shared=state.form.shared_cache, seqlens=seqlens_k, total=total_sequence_length
        )
        state.cache = cache
        state.logit_positions = logit_positions if self.head_picks else None
        kwargs: dict[str, Any] = {}
        if self.takes_positions:
            kwargs["position_ids"] = self._positions(input_ids, seqlens_k, cache)
        logits = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **kwargs).logits
        if not self.head_picks:
            logits = gather_positions(logits, logit_positions)
        return logits, cache.present

    def _positions(self, input_ids: torch.Tensor, seqlens_k: torch.Tensor, cache: GraphCache) -> torch.Tensor:
        """(B, S): a prefill starts at 0 in every row, a step at the row's own length.

        In a right-padded prefill seqlens_k + 1 - S is negative for the shorter rows, hence the clamp. The
        length of a shared buffer is its capacity, so it says nothing about positions.
        """
        if not cache.shared:
            steps = torch.arange(input_ids.shape[1])[None]
            return (steps + cache.past_length).expand(input_ids.shape[0], -1)
        # Counted by a sum of ones: a shape would be computed on the CPU, and a GPU could not replay the step.
        steps = (input_ids * 0 + 1).cumsum(1) - 1
        start = (seqlens_k.to(torch.int64)[:, None] - steps[:, -1:]).clamp(min=0)
        return start + steps


class EncoderGraph(nn.Module):
    """Token ids and mask to class logits, or to a pooled embedding."""

    def __init__(self, model: nn.Module, names: list[str], pool: Callable[..., torch.Tensor] | None) -> None:
        super().__init__()
        self.model, self.names, self.pool = model, names, pool

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        feeds = dict(zip(self.names, inputs, strict=True))
        output = self.model(**feeds)
        if self.pool is None:
            return output.logits
        return self.pool(output.last_hidden_state, feeds["attention_mask"])


class VisionGraph(nn.Module):
    """Pixels to class logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


def pool(mode: str, normalize: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The pooling of sentence-transformers: hidden (B, S, D) and mask (B, S) -> (B, D)."""

    def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask[..., None].to(hidden.dtype)
        if mode == "mean":
            vector = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        elif mode == "cls":
            vector = hidden[:, 0]
        elif mode == "max":
            vector = hidden.masked_fill(weights == 0, torch.finfo(hidden.dtype).min).amax(1)
        elif mode == "lasttoken":
            last = (mask.sum(1) - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
            vector = hidden.gather(1, last).squeeze(1)
        else:
            raise ExportError(f"Pooling {mode!r} is not known.", "Use mean, cls, max or lasttoken.")
        return torch.nn.functional.normalize(vector, dim=-1) if normalize else vector

    return pooled


def sample_inputs(checkpoint: Checkpoint, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Small valid inputs for the checkpoint's own forward."""
    if checkpoint.family == "vision":
        return {"pixel_values": sample_pixels(checkpoint.model, batch)}
    generator = torch.Generator().manual_seed(0)
    vocabulary = checkpoint.model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary // 2, vocabulary, (batch, length), generator=generator)
    inputs = {"input_ids": ids}
    if checkpoint.family == "encoder":
        inputs["attention_mask"] = torch.ones_like(ids)
        if "token_type_ids" in inspect.signature(checkpoint.model.forward).parameters:
            inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def cache_layers(checkpoint: Checkpoint) -> list[LayerShape]:
    """Measured on the cache that a real forward fills, not read from the configuration."""
    ids = sample_inputs(checkpoint, batch=1, length=2)["input_ids"]
    with torch.no_grad():
        cache = getattr(checkpoint.model(input_ids=ids, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if not layers or not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        raise ExportError(
            f"{type(checkpoint.model).__name__} keeps no cache of keys and values ({type(cache).__name__}).",
            "Only attention caches can be exported; state-space and linear-attention layers cannot.",
        )
    return [LayerShape(k.keys.shape[1], k.keys.shape[3], k.values.shape[3]) for k in layers]


def decoder_graph(
    checkpoint: Checkpoint, state: TraceState, layers: list[LayerShape], head_picks: bool
) -> Graph:
    """input_ids, seqlens_k, total_sequence_length, logit_positions, past -> logits, present."""
    batch, length, past = 2, 3, 5
    ids = sample_inputs(checkpoint, batch, length)["input_ids"]
    pairs = [
        (torch.zeros(batch, s.kv_heads, past, s.key_dim), torch.zeros(batch, s.kv_heads, past, s.value_dim))
        for s in layers
    ]
    inputs = {
        "input_ids": ids,
        "seqlens_k": torch.full((batch,), past + length - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor(past + length, dtype=torch.int32),
        "logit_positions": torch.tensor([[0, 2]] * batch),
        "past": pairs,
    }
    b, s, p, n = (Dim(name) for name in ("batch", "sequence", "past", "positions"))
    shapes: tuple[Any, ...] = (
        {0: b, 1: s},
        {0: b},
        {},
        {0: b, 1: n},
        [({0: b, 2: p}, {0: b, 2: p}) for _ in layers],
    )
    caches = [f"{i}.{part}" for i in range(len(layers)) for part in ("key", "value")]
    return Graph(
        "decoder",
        DecoderGraph(checkpoint.model, state, head_picks).eval(),
        inputs,
        shapes,
        [*list(inputs)[:4], *(f"past.{c}" for c in caches)],
        ["logits", *(f"present.{c}" for c in caches)],
    )


def encoder_graph(checkpoint: Checkpoint) -> Graph:
    """input_ids, attention_mask[, token_type_ids] -> logits, or a pooled embedding."""
    inputs = sample_inputs(checkpoint)
    names = list(inputs)
    pooling = checkpoint.pooling
    reduce = None if pooling is None else pool(pooling.mode, pooling.normalize)
    axes = {0: Dim("batch"), 1: Dim("sequence")}
    module = EncoderGraph(checkpoint.model, names, reduce).eval()
    return Graph(
        "encoder",
        module,
        inputs,
        (tuple(axes for _ in names),),
        names,
        ["logits" if pooling is None else "embedding"],
    )


def vision_graph(checkpoint: Checkpoint) -> Graph:
    """pixel_values -> logits."""
    inputs = sample_inputs(checkpoint)
    module = VisionGraph(checkpoint.model).eval()
    return Graph("vision", module, inputs, ({0: Dim("batch")},), ["pixel_values"], ["logits"])
