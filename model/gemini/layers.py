"""One layer of the encoder and one of the decoder.

Each part is wrapped as x + dropout(part(norm(x))): the residual connection of Vaswani et al. 2017, section
3.1, with the norm before the part (Xiong et al. 2020, "On Layer Normalization in the Transformer
Architecture"), which trains without a long warm-up.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from gemini.model.gemini.attention import MultiHeadAttention
from gemini.model.gemini.configuration import GeminiConfig


class FeedForward(nn.Module):
    """Two linear maps at every position (section 3.3), between them GELU (Hendrycks and Gimpel 2016)."""

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class EncoderLayer(GradientCheckpointingLayer):
    """Self-attention in both directions, then feed-forward."""

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__()
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = MultiHeadAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """hidden_states (B, N, D); attention_mask as the attention implementation takes it."""
        x = hidden_states
        attended, _ = self.self_attn(self.self_attn_norm(x), attention_mask=attention_mask, **kwargs)
        x = x + self.dropout(attended)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderLayer(GradientCheckpointingLayer):
    """Causal self-attention, then cross-attention over the encoder's output, then feed-forward."""

    def __init__(self, config: GeminiConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = MultiHeadAttention(config, layer_idx, is_causal=True)
        self.cross_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = MultiHeadAttention(config, layer_idx)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states (B, T, D) with encoder_hidden_states (B, S, D) -> (B, T, D)."""
        x = hidden_states
        attended, _ = self.self_attn(
            self.self_attn_norm(x), attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        x = x + self.dropout(attended)
        attended, _ = self.cross_attn(
            self.cross_attn_norm(x),
            encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        x = x + self.dropout(attended)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
