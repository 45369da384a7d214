"""What a picture reminds of: a memory of things, each with a key to be recognized by and a vector to be read.

An encoder and decoder that read the grid itself are taught by drawings of few hands, in which they are always
sure; another hand's drawings lie between those, and what they make of that is worse than what a linear layer
makes of it. A memory answers with what it holds, whatever the hand.
"""

import torch
from torch import nn

from gemini.model.gemini.configuration import GeminiConfig


class Prototypes(nn.Module):
    """Quarters of a picture (B, 4 D) -> the vector of the thing it resembles most (B, 1, D).

    The retrieval of Ramsauer et al., "Hopfield Networks is All You Need", arXiv:2008.02217, equation 10:
    softmax(beta q K^T) V, with one query a picture. ``beta`` is ``config.prototype_sharpness``: among keys
    that fit about as well, a mixture of their vectors would be the name of neither.
    """

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__()
        width, count = config.hidden_size, config.image_prototypes
        self.query = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.keys = nn.Linear(width, count)
        self.values = nn.Linear(count, width, bias=False)
        self.sharpness = float(config.prototype_sharpness)

    def resemblance(self, quarters: torch.Tensor) -> torch.Tensor:
        """How much the picture looks like each thing: logits (B, prototypes)."""
        return self.keys(self.norm(self.query(quarters)))

    def forward(self, quarters: torch.Tensor) -> torch.Tensor:
        return self.values((self.sharpness * self.resemblance(quarters)).softmax(-1))[:, None]
