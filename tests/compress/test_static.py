"""Fixed codes of activations: what calibration finds, and what recipes say about it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import make_llama, make_windows
from transformers import ViTConfig, ViTForImageClassification

from gemini.compress.apply import run_recipe
from gemini.compress.awq import fold_divisors
from gemini.compress.modules import ChannelwiseConv, ChannelwiseLinear
from gemini.compress.ranges import codes_of
from gemini.compress.recipe import Recipe, load_recipe
from gemini.compress.smooth import smoothing_divisors
from gemini.compress.specs import (
    Entropy,
    MinMax,
    PerBlock,
    Percentile,
    PerChannel,
    QuantizeInt8,
    spec_from_dict,
)
from gemini.compress.static import convolution_codes, input_codes
from gemini.errors import RecipeError


def make_vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=16)).eval()
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data += 0.5 * torch.randn(parameter.shape)
    return model.requires_grad_(False)


def images(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)} for _ in range(count)]


def quantize(model, *specs, windows=()):
    checkpoint = SimpleNamespace(model=model, family="vision")
    (report,) = run_recipe(checkpoint, Recipe("test", specs), windows, progress=False)
    return report


def test_codes_span_what_all_windows_hold():
    model, windows = make_vit(), images()
    name, conv = "vit.layers.1.mlp.fc2", "vit.embeddings.patch_embeddings.projection"
    seen: dict[str, list[np.ndarray]] = {}

    def keep(key):
        return lambda _module, args, output: seen.setdefault(key, []).append(
            (args[0].numpy(), output.numpy())
        )

    hooks = [model.get_submodule(key).register_forward_hook(keep(key)) for key in (name, conv)]
    for window in windows:
        model(**window)
    for hook in hooks:
        hook.remove()
    divisor = torch.rand(96, generator=torch.Generator().manual_seed(2)) + 0.5
    found = input_codes(model, windows, [name], MinMax(), {name: divisor}, progress=False)
    divided = np.concatenate([x for x, _ in seen[name]]) / divisor.numpy()
    assert found == {name: codes_of(float(divided.min()), float(divided.max()))}
    ends = convolution_codes(model, windows, [conv], MinMax(), progress=False)[conv]
    for codes, values in zip(ends, zip(*seen[conv], strict=True), strict=True):
        assert codes == codes_of(float(np.concatenate(values).min()), float(np.concatenate(values).max()))


@pytest.mark.parametrize("method", [Percentile(98.0), Entropy()])
def test_narrower_methods_cut_the_tails(method):
    model, windows, name = make_vit(), images(), "vit.layers.0.attention.o_proj"
    wide = input_codes(model, windows, [name], MinMax(), {}, progress=False)[name]
    narrow = input_codes(model, windows, [name], method, {}, progress=False)[name]
    assert 0.2 * wide.scale < narrow.scale <= wide.scale
    if isinstance(method, Percentile):
        assert narrow.scale < 0.9 * wide.scale


def test_a_recipe_fixes_the_codes_of_linears_and_convolutions():
    model, windows = make_vit(), images()
    expected = model(**windows[0]).logits
    report = quantize(model, QuantizeInt8(PerChannel(), MinMax()), windows=windows)
    assert report.calibration_windows == 3 and report.options["activations"] == {"type": "min_max"}
    linears = [m for m in model.modules() if isinstance(m, ChannelwiseLinear)]
    (conv,) = (m for m in model.modules() if isinstance(m, ChannelwiseConv))
    assert len(linears) == 13 and all(layer.input_codes is not None for layer in linears)
    assert conv.codes is not None
    error = (model(**windows[0]).logits - expected).square().mean() / expected.var()
    assert float(error) < 1e-3


def test_the_builtin_recipe_smooths_without_a_product_where_norms_and_values_can_take_it_in():
    model, windows = make_vit(), images()
    expected = model(**windows[0]).logits
    report = quantize(model, *load_recipe("int8-static").specs, windows=windows)
    left = {n for n, m in model.named_modules() if isinstance(m, ChannelwiseLinear) and m.divisor is not None}
    # After GELU nothing can; the class token of the last norm is cut out before the classifier reads it.
    assert left == {"vit.layers.0.mlp.fc2", "vit.layers.1.mlp.fc2", "classifier"}
    assert len(report.folded) == 6
    error = (model(**windows[0]).logits - expected).square().mean() / expected.var()
    assert float(error) < 2e-3


def test_folded_divisors_keep_the_outputs():
    model, windows = make_vit(), images()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    expected = model(**windows[0]).logits
    divisors = smoothing_divisors(model, windows, names, 0.8, progress=False)
    before = model.get_submodule("vit.layers.0.attention.q_proj").weight.clone()
    left, groups = fold_divisors(model, windows, divisors)
    assert set(left) | {name for group in groups for name in group.consumers} == set(names)
    after = model.get_submodule("vit.layers.0.attention.q_proj").weight
    torch.testing.assert_close(after, before * divisors["vit.layers.0.attention.q_proj"])
    found = model(**windows[0]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_what_cannot_be_static_is_refused():
    with pytest.raises(RecipeError, match="need calibration"):
        quantize(make_vit(), QuantizeInt8(activations=MinMax()))
    with pytest.raises(RecipeError, match="in blocks"):
        QuantizeInt8(PerBlock(32), MinMax())
    llama = SimpleNamespace(model=make_llama(), family="decoder")
    with pytest.raises(RecipeError, match="encoders and image models"):
        run_recipe(llama, load_recipe("int8-static"), make_windows(), progress=False)
    with pytest.raises(RecipeError, match="percent"):
        Percentile(101)
    with pytest.raises(RecipeError, match="Did you mean `entropy`"):
        spec_from_dict({"type": "quantize_int8", "activations": {"type": "entropi"}})
