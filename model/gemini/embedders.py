"""From a modality's raw form to vectors: the only part of the model that knows what a token or a pixel is.

A further modality (audio, video) is one more class here that fulfils `Embedder`; the encoder does not change.
"""

from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn

from gemini.model.gemini.configuration import GeminiConfig
from gemini.model.gemini.positions import GridPositions, text_positions
from gemini.model.gemini.prototypes import Prototypes


class Embedder(Protocol):
    """One modality: raw input (B, ...) -> vectors (B, N, hidden_size), positions included."""

    def __call__(self, raw: torch.Tensor, /) -> torch.Tensor: ...


class TextEmbedder(nn.Module):
    """Token ids (B, T) -> (B, T, D): a learned vector a token plus its position."""

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.positions = text_positions(config)
        self.dropout = nn.Dropout(config.dropout)
        # Sinusoids have a size of their own, so tokens are brought to it (Vaswani et al. 2017, section 3.4);
        # learned positions start as small as the tokens.
        self.scale = config.hidden_size**0.5 if config.positions == "sinusoidal" else 1.0

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """position_ids (T,) or (B, T); counted from 0 unless given."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.dropout(self.tokens(input_ids) * self.scale + self.positions(position_ids))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016, "Deep Residual Learning", figure 2)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: Any = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        y = nn.functional.relu(self.norm1(self.conv1(x)))
        return nn.functional.relu(self.norm2(self.conv2(y)) + self._across(x))

    def _across(self, x: torch.Tensor) -> torch.Tensor:
        """The shortcut; in training its convolution is a matrix product.

        oneDNN's kernel for the gradient of 1 x 1 weights on CPUs that have AVX2 and no more
        (jit_avx2_1x1_convolution_bwd_weights in torch 2.13) writes past its buffers.
        """
        if not self.training or isinstance(self.shortcut, nn.Identity):
            return self.shortcut(x)
        conv, norm = self.shortcut
        across, down = conv.stride
        pixels = x[:, :, ::across, ::down].permute(0, 2, 3, 1)
        return norm(nn.functional.linear(pixels, conv.weight[:, :, 0, 0]).permute(0, 3, 1, 2))


def soften(pixels: torch.Tensor, blur: float) -> torch.Tensor:
    """Pixels (B, C, H, W) mixed with their mean over 3 x 3 neighbours, weights (1, 2, 1) both ways.

    Hands differ most in the finest lines, so those are the worst to go by.
    """
    if not blur:
        return pixels
    around = nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate")
    for _ in range(2):  # pairs of neighbours, twice
        around = nn.functional.avg_pool2d(around, 2, stride=1)
    return torch.lerp(pixels, around, blur)


class ImageEmbedder(nn.Module):
    """Pixels (B, 3, H, W) -> (B, N, D): a residual tower, a projection, and what is made of their grid.

    That is the grid itself, N = (H / S) * (W / S) vectors with S = 2 ** stages, or, with prototypes, the one
    vector that it recalls.

    Plain patches projected at once need far more pictures to learn what an edge is: on 1,563 drawings they
    stayed at 1 % where such a tower reached 50 % in a third of the time.
    """

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__()
        widths = config.image_channels
        first, last = widths[0], widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()
        )
        self.stages = nn.Sequential(
            ResidualBlock(first, first, stride=1),
            *(ResidualBlock(wide, wider, stride=2) for wide, wider in pairwise(widths)),
        )
        self.projection = nn.Linear(last, config.hidden_size)
        # One of the two: a grid has places, a thing that is recalled has none.
        self.prototypes: Any = Prototypes(config) if config.image_prototypes else None
        self.positions: Any = None
        if not config.image_prototypes:
            self.positions = GridPositions(config.image_grid, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blur = float(config.image_blur)

    @property
    def tower(self) -> nn.Module:
        """The part that knows neither positions nor prototypes."""
        return nn.ModuleList([self.stem, self.stages, self.projection])

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What each cell of the grid shows, not where it stands; pixels may be of any size."""
        return self._project(self._grid(pixel_values))

    def quarters(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The mean of what the cells of each quarter show, side by side: (B, 4 D)."""
        grid = self._grid(pixel_values)
        half = (grid.shape[2] // 2, grid.shape[3] // 2)
        return self._project(nn.functional.avg_pool2d(grid, half)).flatten(1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Row by row from the top left, or what is recalled."""
        if self.prototypes is not None:
            return self.dropout(self.prototypes(self.quarters(pixel_values)))
        return self.dropout(self.features(pixel_values) + self.positions())

    def _grid(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.stages(self.stem(soften(pixel_values, self.blur)))

    def _project(self, grid: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, h * w, D)."""
        return self.projection(grid.flatten(2).transpose(1, 2))
