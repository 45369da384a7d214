"""Attention as one operator, registered under transformers' own attention interface.

With a cache of its own tokens it becomes GroupQueryAttention, over cached vectors of an encoder
MultiHeadAttention, else the standard's Attention, which on CPU is nearly twice as fast as MultiHeadAttention
with a mask (benchmarks/LOG.md). Anything that the operators cannot say (an unusual mask, a bias, sinks)
raises FormMismatch and the exporter falls back to the model's own attention.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gemini.export.trace_state import FormMismatch, RotaryTables, TraceState, current_trace
from gemini.export.twins.cache import GraphCache
from gemini.export.twins.mask import MaskMeaning, read_mask
from gemini.export.twins.operators import CONTRIB, emit, emit_many

NAME = "gemini_edge"
OPSET = 23  # the first with Attention
_SINKS = 11  # the place of the sinks among the inputs of GroupQueryAttention


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskMeaning | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """query (B, H, S, D), key and value (B, H_kv, S, D) float32 -> (B, S, H, D).

    ``s_aux`` (H,): a score for each head that takes part in the softmax and has no value (a sink).
    """
    state, mask = current_trace(), attention_mask
    unsupported = sorted(n for n in ("position_bias", "attention_bias") if other.get(n) is not None)
    if unsupported:
        raise FormMismatch(f"attention with {', '.join(unsupported)}")
    if isinstance(mask, torch.Tensor):
        raise FormMismatch("the model fills its own attention mask")
    if mask is not None and not mask.known:
        raise FormMismatch("an attention mask is neither causal, windowed nor bidirectional")
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    cache = state.cache
    layer = None if cache is None else cache.take_updated()
    if cache is not None and layer is not None:
        return _grouped(state, cache, layer, query, key, value, mask, scale, softcap, s_aux), None
    if s_aux is not None:
        raise FormMismatch("attention with sinks and without a cache")
    causal = mask.causal if mask is not None else bool(other.get("is_causal") or False)
    return _multi_head(state, query, key, value, mask, scale, softcap, causal), None


def _flat(x: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) -> (B, S, H * D)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _grouped(
    state: TraceState,
    cache: GraphCache,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskMeaning | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, length, dim = query.shape
    if mask is not None and not mask.causal:
        raise FormMismatch("cached attention that is not causal")
    if value.shape[-1] != dim:
        raise FormMismatch("keys and values of different widths")
    rotary: RotaryTables | None = state.take_rotary()
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": key.shape[1],
        "scale": scale,
        "do_rotary": int(rotary is not None),
    }
    if softcap:
        attributes["softcap"] = float(softcap)
    if mask is not None and mask.window:
        attributes["local_window_size"] = mask.window
    inputs = [_flat(query), _flat(key), _flat(value), *cache.past[layer], cache.seqlens, cache.total]
    if rotary is not None:
        attributes["rotary_interleaved"] = int(rotary.interleaved)
        inputs += [rotary.cos, rotary.sin]
    if sinks is not None:
        inputs += [None] * (_SINKS - len(inputs)) + [sinks]
    present = (batch, key.shape[1], cache.past_length + length, dim)
    output, keys, values = emit_many(
        f"{CONTRIB}::GroupQueryAttention",
        inputs,
        attributes,
        ((batch, length, heads * dim), present, present),
    )
    cache.present[layer] = (keys, values)
    return output.view(batch, length, heads, dim)


def _multi_head(
    state: TraceState,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskMeaning | None,
    scale: float,
    softcap: float | None,
    causal: bool,
) -> torch.Tensor:
    batch, heads, length, dim = query.shape
    if state.pending_rotary is not None or softcap or (mask is not None and mask.window and mask.causal):
        raise FormMismatch("attention without a cache that rotates, caps or has a causal window")
    if value.shape[-1] != dim:
        raise FormMismatch("keys and values of different widths")
    if state.cross is not None and state.cross.holds(key):  # (B, H, S, D), which Attention would not take
        if mask is not None and mask.window:
            raise FormMismatch("a window over the vectors of an encoder")
        padding = None if mask is None or mask.padding is None else mask.padding.to(torch.int32)
        attributes = {"num_heads": heads, "scale": scale, "unidirectional": int(causal)}
        cached = (_flat(query), key, value, None, padding)
        output = emit(f"{CONTRIB}::MultiHeadAttention", cached, attributes, (batch, length, heads * dim))
        return output.view(batch, length, heads, dim)
    attributes = {
        "q_num_heads": heads,
        "kv_num_heads": key.shape[1],
        "scale": scale,
        "is_causal": int(causal),
    }
    inputs = (_flat(query), _flat(key), _flat(value), _summand(mask, length))
    output = emit("Attention", inputs, attributes, (batch, length, heads * dim), version=OPSET)
    return output.view(batch, length, heads, dim)


def _summand(mask: MaskMeaning | None, length: int | torch.SymInt) -> torch.Tensor | None:
    """What is added to the scores, float32 (B or 1, 1, queries, keys): nothing, or the most negative number
    where a key is padding or outside of the window."""
    if mask is None or (mask.padding is None and not mask.window):
        return None
    seen = torch.ones(1, 1, 1, 1)
    if mask.padding is not None:
        seen = mask.padding.to(torch.float32)[:, None, None]
    if mask.window:
        places = torch.arange(length)
        near = (places[:, None] - places).abs() <= mask.window
        seen = seen * near.to(torch.float32)
    return (torch.finfo(torch.float32).min * (1.0 - seen)).expand(-1, 1, length, -1)


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, read_mask)
