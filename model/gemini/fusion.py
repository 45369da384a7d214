"""Where the modalities meet: in all layers, only after the last, or in the upper layers.

    early     image ┐
                    ├── layers ── norm
              text  ┘

    late      image ── layers ── norm ┐
                                      ├──
              text ─── layers ── norm ┘

    hybrid    image ── layers ┐
                              ├── layers ── norm
              text ─── layers ┘

Each module has two entrances, because what depends on the image alone is computed (and exported) apart:
``image_alone`` takes image vectors as far as they go without the text, ``forward`` does the rest and returns
image vectors first, then text. An image of no vectors (B, 0, D) is the way to say "no image".
"""

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask

from gemini.model.gemini.configuration import GeminiConfig
from gemini.model.gemini.layers import EncoderLayer


class EarlyFusion(nn.Module):
    """One encoder over all vectors: every layer may relate a word to a part of the picture."""

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__()
        self.joint = Layers(config, config.layer_split.joint)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def image_alone(self, image: torch.Tensor, **_: Any) -> torch.Tensor:
        """(B, N, D) as it is."""
        return image

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        """image (B, N, D), text (B, T, D), text_mask (B, T) or None -> (B, N + T, D)."""
        vectors = torch.cat([image, text], dim=1)
        return self.norm(self.joint(vectors, joint_mask(text_mask, vectors), **kwargs))


class LateFusion(nn.Module):
    """An encoder each; the decoder's cross-attention is the first to see both."""

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__()
        split = config.layer_split
        self.image = Layers(config, split.image)
        self.image_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.text = Layers(config, split.text)
        self.text_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def image_alone(self, image: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, N, D) through the image's own encoder."""
        return self.image_norm(self.image(image, None, **kwargs))

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        """image (B, N, D), text (B, T, D), text_mask (B, T) or None -> (B, N + T, D)."""
        return torch.cat([image, self.text_norm(self.text(text, text_mask, **kwargs))], dim=1)


class HybridFusion(nn.Module):
    """Separate lower layers, where a modality finds its own words, and joint upper layers."""

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__()
        split = config.layer_split
        self.image = Layers(config, split.image)
        self.text = Layers(config, split.text)
        self.joint = Layers(config, split.joint)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def image_alone(self, image: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, N, D) through the image's own lower layers."""
        return self.image(image, None, **kwargs)

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        """image (B, N, D), text (B, T, D), text_mask (B, T) or None -> (B, N + T, D)."""
        vectors = torch.cat([image, self.text(text, text_mask, **kwargs)], dim=1)
        return self.norm(self.joint(vectors, joint_mask(text_mask, vectors), **kwargs))


class Layers(nn.ModuleList):
    """Encoder layers one after another, under one padding mask."""

    def __init__(self, config: GeminiConfig, count: int) -> None:
        super().__init__(EncoderLayer(config) for _ in range(count))
        self.config = config

    def forward(self, vectors: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """vectors (B, N, D); mask (B, N), 1 where a vector counts, or None when all do."""
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=vectors, attention_mask=mask)
        for layer in self:
            vectors = layer(vectors, mask, **kwargs)
        return vectors


def joint_mask(text_mask: torch.Tensor | None, vectors: torch.Tensor) -> torch.Tensor | None:
    """The mask (B, N + T) of image and text from that of the text (B, T): an image has no padding.

    A mask that covers all of ``vectors`` (B, N + T, D) already stays as it is.
    """
    if text_mask is None:
        return None
    return nn.functional.pad(text_mask, (vectors.shape[1] - text_mask.shape[1], 0), value=1)


FUSIONS: dict[str, type[EarlyFusion | LateFusion | HybridFusion]] = {
    "early": EarlyFusion,
    "late": LateFusion,
    "hybrid": HybridFusion,
}
