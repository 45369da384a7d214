"""The decoder: predicts the next token from the tokens before it and from the encoder's vectors."""

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from gemini.model.gemini.attention import MultiHeadAttention
from gemini.model.gemini.configuration import GeminiConfig
from gemini.model.gemini.embedders import TextEmbedder
from gemini.model.gemini.layers import DecoderLayer
from gemini.model.gemini.pretrained import GeminiPreTrainedModel


class GeminiDecoder(GeminiPreTrainedModel):
    """Tokens so far and the encoder's vectors to one vector a token."""

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DecoderLayer,
        "attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__(config)
        self.text = TextEmbedder(config)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.text.tokens = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """last_hidden_state (B, T, D) of the new tokens.

        Args:
            input_ids: int64 (B, T), the tokens that the cache does not hold yet.
            encoder_hidden_states: (B, S, D).
            attention_mask: (B, past + T), 0 for padding; None when nothing is padded.
            encoder_attention_mask: (B, S), 0 for padding; None when nothing is padded.
            position_ids: (B, T); counted on from the cache unless given.
        """
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(
                DynamicCache(config=self.config), DynamicCache(config=self.config)
            )
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device) + past
        hidden_states = self.text(input_ids, position_ids)

        own_cache = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            own_cache = past_key_values.self_attention_cache
        attention_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=own_cache,
        )
        encoder_attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )
