"""The encoder: every modality becomes vectors, fusion relates them."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from gemini.model.gemini.attention import MultiHeadAttention
from gemini.model.gemini.configuration import GeminiConfig
from gemini.model.gemini.embedders import ImageEmbedder, TextEmbedder
from gemini.model.gemini.fusion import FUSIONS
from gemini.model.gemini.layers import EncoderLayer
from gemini.model.gemini.pretrained import GeminiPreTrainedModel


class GeminiEncoder(GeminiPreTrainedModel):
    """Text, and an image where there is one, to the vectors that the decoder attends to."""

    _can_record_outputs = {"hidden_states": EncoderLayer, "attentions": MultiHeadAttention}  # noqa: RUF012

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__(config)
        self.text = TextEmbedder(config)
        self.image = ImageEmbedder(config)
        self.fusion = FUSIONS[config.fusion](config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.text.tokens = value

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Everything that depends on the image alone: pixels (B, 3, H, W) -> (B, N, D)."""
        return self.fusion.image_alone(self.image(pixel_values), **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """The image's vectors first, then the text's: last_hidden_state (B, N + T, D).

        Args:
            input_ids: int64 (B, T).
            attention_mask: (B, T), 1 for a token and 0 for padding; None when nothing is padded.
            image_features: (B, N, D) from `get_image_features`; N may be 0.
            pixel_values: (B, 3, H, W), in place of image_features. Without either there is no image: N = 0.
        """
        text = self.text(input_ids)
        if image_features is None and pixel_values is not None:
            image_features = self.get_image_features(pixel_values, **kwargs)
        if image_features is None:
            image_features = text[:, :0]
        return BaseModelOutput(last_hidden_state=self.fusion(image_features, text, attention_mask, **kwargs))
