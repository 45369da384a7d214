"""SmoothQuant against its formula, on whole models and in the operator's own arithmetic."""

import numpy as np
import pytest
import torch
from small_models import make_llama, make_windows, run
from transformers import BertConfig, BertModel

from gemini.compress.layers import Channels, make_linear
from gemini.compress.modules import ChannelwiseLinear
from gemini.compress.smooth import collect_peaks, smoothing_divisor, smoothing_divisors
from gemini.compress.specs import PerBlock, PerChannel, QuantizeInt8
from gemini.errors import RecipeError


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = BertModel(BertConfig(vocab_size=160, num_attention_heads=2, **sizes), add_pooling_layer=False)
    return model.eval().requires_grad_(False)


def test_the_divisor_is_the_papers():
    generator = np.random.default_rng(0)
    peaks, largest = generator.uniform(0.1, 50, 9), generator.uniform(0.01, 1, 9)
    for strength in (0.0, 0.3, 0.8, 1.0):
        expected = [x**strength / w ** (1 - strength) for x, w in zip(peaks, largest, strict=True)]
        found = smoothing_divisor(torch.from_numpy(peaks), torch.from_numpy(largest), strength)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    unseen = smoothing_divisor(torch.zeros(2), torch.zeros(2), 0.5)
    assert bool(unseen.isfinite().all()) and bool((unseen > 0).all())


def test_peaks_are_those_of_all_windows_and_readers_of_one_tensor_share_them():
    model, windows = bert(), make_windows(3)
    names = [f"encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")]
    names.append("encoder.layer.0.output.dense")
    peaks, leaders = collect_peaks(model, windows, names, progress=False)
    assert leaders == {name: names[0] for name in names[:3]} | {names[3]: names[3]}
    seen = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _m, a, name=name: seen[name].append(a[0]))
    for window in windows:
        model(torch.as_tensor(window))
    for name in (names[0], names[3]):
        torch.testing.assert_close(peaks[name], torch.cat(seen[name], 1).abs().amax((0, 1)), rtol=0, atol=0)


def test_readers_of_one_tensor_get_one_divisor_from_their_largest_weight():
    model, windows = bert(), make_windows(3)
    names = [f"encoder.layer.1.attention.self.{part}" for part in ("query", "key", "value")]
    divisors = smoothing_divisors(model, windows, names, 0.6, progress=False)
    peaks, _ = collect_peaks(model, windows, names, progress=False)
    weights = torch.cat([model.get_submodule(name).weight for name in names])
    expected = peaks[names[0]] ** 0.6 / weights.abs().amax(0) ** 0.4
    for name in names:
        torch.testing.assert_close(divisors[name], expected)


def test_without_rounding_nothing_changes():
    weight, divisor = torch.randn(24, 40), torch.rand(40) * 9 + 0.1
    layer = make_linear(weight, None, Channels(), divisor=divisor)
    assert isinstance(layer, ChannelwiseLinear)
    # 8 bits of the largest weight in a row, as it was multiplied.
    step = (weight * divisor).abs().amax(1, keepdim=True) / 127 / divisor
    assert bool(((layer.dequantized() - weight).abs() <= step * 0.5001).all())


def eight_bit_linear(layer: ChannelwiseLinear, x: torch.Tensor) -> torch.Tensor:
    """What DynamicQuantizeMatMul computes: activations with one scale and zero point for the whole call."""
    if layer.divisor is not None:
        x = x / layer.divisor
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / 255
    zero = round(-low / scale)
    codes = ((x / scale).round() + zero).clamp(0, 255) - zero
    return (codes * scale) @ (layer.qweight.float() * layer.scales[:, None]).T


def test_outliers_cost_less():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 128, generator=generator), torch.randn(48, 128, generator=generator) * 0.05
    x[:, 3] *= 100
    exact = x @ weight.T
    errors = {}
    for strength in (None, 0.5):
        divisor = None
        if strength is not None:
            divisor = smoothing_divisor(x.abs().amax(0), weight.abs().amax(0), strength)
        layer = make_linear(weight, None, Channels(), divisor=divisor)
        errors[strength] = float((eight_bit_linear(layer, x) - exact).square().mean())
    assert errors[0.5] < 0.1 * errors[None]


def test_a_recipe_smooths_what_is_quantized_per_channel():
    model, windows = bert(), make_windows(3)
    before = model(torch.as_tensor(windows[0])).last_hidden_state
    (report,) = run(model, QuantizeInt8(PerChannel(), smoothing=0.5), calibration=windows)
    layers = [module for module in model.modules() if isinstance(module, ChannelwiseLinear)]
    # the products of values take in the division in front of the two output projections
    assert len(layers) == 12 and sum(layer.divisor is None for layer in layers) == len(report.folded) == 2
    assert report.calibration_windows == 3 and report.options["smoothing"] == 0.5
    after = model(torch.as_tensor(windows[0])).last_hidden_state
    assert float((after - before).square().mean() / before.var()) < 1e-3
    plain = make_llama()
    (report,) = run(plain, QuantizeInt8(PerBlock(32), smoothing=0.5), calibration=windows)
    assert report.calibration_windows == 0  # a scale a block needs none
    with pytest.raises(RecipeError, match="smoothing"):
        QuantizeInt8(smoothing=1.5)
