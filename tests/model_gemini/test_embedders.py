"""The convolutional tower against transformers' ResNet, and the order of its vectors."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer

from gemini.model.gemini import GeminiConfig
from gemini.model.gemini.embedders import ImageEmbedder, ResidualBlock, soften

TOLERANCE = 1e-5  # float32 sums in another order


@pytest.mark.parametrize(("channels_out", "stride"), [(6, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("training", [False, True])
def test_residual_block_equals_resnet(channels_out: int, stride: int, training: bool) -> None:
    torch.manual_seed(0)
    ours = ResidualBlock(6, channels_out, stride)
    theirs = ResNetBasicLayer(6, channels_out, stride)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
    # The same parts in the same order: first convolution, second, shortcut.
    values = ours.state_dict().values()
    theirs.load_state_dict(dict(zip(theirs_order(theirs), values, strict=True)))
    x = torch.randn(3, 6, 9, 9)
    expected = theirs.train(training)(x)
    torch.testing.assert_close(ours.train(training)(x), expected, atol=TOLERANCE, rtol=0)


def theirs_order(block: nn.Module) -> list[str]:
    """The names of ResNet's weights, which keeps the shortcut first, in the order of ours."""
    names = list(block.state_dict())
    return sorted(names, key=lambda name: name.startswith("shortcut"))


def test_vectors_stand_for_places_row_by_row(tiny: Any) -> None:
    """A change near the right end of the top row reaches the vector there and none far away."""
    embedder = ImageEmbedder(tiny(image_size=128)).eval()
    pixels = torch.zeros(1, 3, 128, 128)
    changed = pixels.clone()
    changed[:, :, :8, 104:112] = 1
    moved = (embedder(changed) - embedder(pixels)).abs().amax(-1).view(16, 16)
    assert moved[0, 13] > 0
    assert moved[0, 0] == moved[13, 0] == moved[15, 15] == 0


def test_statistics_of_the_norms_follow_training(tiny: Any) -> None:
    embedder = ImageEmbedder(tiny()).train()
    before = embedder.stem[1].running_mean.clone()
    embedder(torch.randn(4, 3, 16, 16) + 3)
    assert not torch.equal(embedder.stem[1].running_mean, before)


def test_softening_is_a_convolution_with_the_binomial_kernel():
    pixels = torch.randn(2, 3, 8, 9)
    line = torch.tensor([1.0, 2.0, 1.0])
    kernel = (line[:, None] * line / 16).expand(3, 1, 3, 3)
    around = torch.nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate")
    blurred = torch.nn.functional.conv2d(around, kernel, groups=3)
    for blur in (0.0, 0.3, 1.0):
        torch.testing.assert_close(soften(pixels, blur), (1 - blur) * pixels + blur * blurred)


def test_a_tower_softens_what_it_sees():
    torch.manual_seed(0)
    sharp, soft = (ImageEmbedder(GeminiConfig(image_blur=blur)).eval() for blur in (0.0, 0.5))
    soft.load_state_dict(sharp.state_dict())
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(soft(pixels), sharp(soften(pixels, 0.5)))
