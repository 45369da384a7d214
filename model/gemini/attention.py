"""Attention: every query takes a weighted mean of values, weighted by how well its key fits.

Vaswani et al. 2017, "Attention Is All You Need", sections 3.2.1 and 3.2.2.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gemini.model.gemini.configuration import GeminiConfig


def scaled_dot_product(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(Q Kᵀ / √d) V (equation 1): the ``eager`` form, the only one that returns its weights.

    Args:
        module: the calling layer; only asked whether it is training.
        query: (B, H, T, d); key and value: (B, H, S, d).
        attention_mask: added to the scores, (B, 1, T, S): 0 where a query may look, the lowest number
            where it may not; None when it may look everywhere.
        scaling: 1 / √d unless given.

    Returns:
        Output (B, T, H, d) and weights (B, H, T, S).
    """
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MultiHeadAttention(nn.Module):
    """Attention in several subspaces at once, then one projection of all heads (section 3.2.2).

    The same class serves self-attention and cross-attention; which, the call decides. The formula itself
    comes from transformers' registry (``config._attn_implementation``): eager, sdpa, or the exporter's.
    """

    # As many key heads as query heads; transformers' attention functions ask.
    num_key_value_groups = 1

    def __init__(self, config: GeminiConfig, layer_idx: int | None = None, is_causal: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx  # the layer's place in the cache; None without one
        self.is_causal = is_causal
        self.head_size = config.head_size
        self.scaling = config.head_size**-0.5
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, T, D) look at themselves, or at key_value_states (B, S, D) where given.

        Returns:
            Output (B, T, D), and the weights (B, H, T, S) where the implementation has them.
        """
        query = self._heads(self.q_proj(hidden_states))
        if key_value_states is None:
            key, value = self._self_keys_values(hidden_states, past_key_values)
        else:
            key, value = self._cross_keys_values(key_value_states, past_key_values)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, scaled_dot_product)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, H, T, d)."""
        return x.view(*x.shape[:-1], -1, self.head_size).transpose(1, 2)

    def _self_keys_values(
        self, states: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the new positions, after those of the past."""
        key, value = self._heads(self.k_proj(states)), self._heads(self.v_proj(states))
        if cache is None:
            return key, value
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        return own.update(key, value, self.layer_idx)

    def _cross_keys_values(
        self, memory: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the encoder's output: the same at every step, so computed at the first."""
        if not isinstance(cache, EncoderDecoderCache):
            return self._heads(self.k_proj(memory)), self._heads(self.v_proj(memory))
        cross = cache.cross_attention_cache
        if cache.is_updated.get(self.layer_idx):
            layer = cross.layers[self.layer_idx]
            return layer.keys, layer.values
        key, value = self._heads(self.k_proj(memory)), self._heads(self.v_proj(memory))
        cache.is_updated[self.layer_idx] = True
        return cross.update(key, value, self.layer_idx)
