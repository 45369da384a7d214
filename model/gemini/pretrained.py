"""What all Gemini models share: how weights start, what transformers may do with them."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from gemini.model.gemini.configuration import GeminiConfig
from gemini.model.gemini.positions import SinusoidalPositions


class GeminiPreTrainedModel(PreTrainedModel):
    """Base of the Gemini models: ``from_pretrained``, ``save_pretrained`` and initial weights."""

    config_class = GeminiConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("EncoderLayer", "DecoderLayer", "ResidualBlock")
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range) for matrices, He et al. 2015 for convolutions, which come before a ReLU."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, SinusoidalPositions):
            init.copy_(module.table, module.reset())
        else:
            super()._init_weights(module)

    @property
    def dummy_inputs(self) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[1, 6]])}
