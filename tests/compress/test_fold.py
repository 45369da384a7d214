"""Batch norms into convolutions: found by running, kept only where the output stays, against torch itself."""

import torch
from torch import nn
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

from gemini.compress.fold import fold_batch_norms
from gemini.compress.layers import make_conv
from gemini.compress.modules import ChannelwiseConv
from gemini.compress.select import select_layers


def trained(model: nn.Module) -> nn.Module:
    """Statistics and gains as training leaves them: none at its start value."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.weight, norm.bias):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
            norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
    return model.eval().requires_grad_(False)


def test_every_norm_of_a_residual_network_is_folded():
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic", image_size=32
    )
    model = trained(ResNetForImageClassification(config))
    pixels = torch.randn(3, 3, 32, 32)
    expected = model(pixel_values=pixels).logits
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert len(fold_batch_norms(model)) == norms > 5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(pixel_values=pixels).logits, expected, atol=1e-4, rtol=1e-4)


class Branching(nn.Module):
    """A convolution whose output is read twice, one in front of a norm, and one that is called twice."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"image_size": 8, "num_channels": 3})()
        self.twice, self.plain, self.again = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norm, self.folded, self.repeated = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        y = self.twice(pixel_values)
        y = y + self.norm(y)
        y = self.folded(self.plain(y))
        return (self.repeated(self.again(self.again(y))),)


def test_a_convolution_that_others_read_keeps_its_norm():
    torch.manual_seed(0)
    model = trained(Branching())
    pixels = torch.randn(2, 3, 8, 8)
    (expected,) = model(pixels)
    assert fold_batch_norms(model) == ["folded"]
    assert isinstance(model.norm, nn.BatchNorm2d) and isinstance(model.folded, nn.Identity)
    torch.testing.assert_close(model(pixels)[0], expected, atol=1e-5, rtol=1e-5)


def test_models_without_pixels_are_left_alone():
    assert fold_batch_norms(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))) == []


def test_packed_convolution_has_the_codes_of_a_slow_loop_and_the_shape_of_the_layer():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, stride=2, padding=1, dilation=2, groups=4).requires_grad_(False)
    packed = make_conv(layer)
    for channel in range(12):
        scale = layer.weight[channel].abs().max() / 127
        torch.testing.assert_close(packed.scales[channel], scale)
        codes = torch.round(layer.weight[channel] / scale).clamp(-127, 127)
        assert (packed.qweight[channel].float() - codes).abs().max() == 0
    x = torch.randn(2, 8, 9, 9)
    weight = packed.qweight.float() * packed.scales[:, None, None, None]
    expected = functional.conv2d(x, weight, layer.bias, 2, 1, 2, 4)
    torch.testing.assert_close(packed(x), expected)
    assert isinstance(packed, ChannelwiseConv) and packed(x).shape == layer(x).shape


def test_convolutions_are_selected_only_where_they_pay():
    model = nn.Module()
    model.large, model.small = nn.Conv2d(16, 16, 3), nn.Conv2d(3, 4, 3)
    model.wrapped = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
    model.requires_grad_(False)
    selection = select_layers(model, 64, ("nothing",), 64, convolutions=True)
    reasons = {item.name: item.reason for item in selection.skipped}
    assert selection.convolutions == ("large",)
    assert "too few" in reasons["small"] and "more than a convolution" in reasons["wrapped"]
    assert select_layers(model, 64, ("lar*",), 64, convolutions=True).convolutions == ()
    assert select_layers(model, 64, (), 64).convolutions == ()
