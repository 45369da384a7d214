"""AWQ: folds that change nothing, strengths against a slow loop, less lost where features are unequal."""

import numpy as np
import pytest
import torch
from small_models import logits_of, make_llama, make_windows, run
from transformers import BertConfig, BertModel, Gemma3ForCausalLM, Gemma3TextConfig

from gemini.compress.awq import (
    STRENGTHS,
    best_strength,
    collect_sizes,
    find_groups,
    fold_awq,
    fold_smoothing,
    scales,
)
from gemini.compress.layers import Integers
from gemini.compress.select import select_layers
from gemini.compress.specs import PerBlock, QuantizeInt4, QuantizeInt8

WINDOWS = make_windows(4, 24)
FORM = Integers(4, 32, symmetric=False, fit="nearest")


def linears(model):
    return select_layers(model, 32, (), 32).linears


def uneven(seed=0):
    """A Llama whose norms let some features through thirty times larger."""
    model = make_llama(seed=seed)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[::16] *= 30
    return model


def gemma():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
    )
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0, 0.3)
    return model


def test_the_groups_of_a_llama_are_found():
    groups = {
        group.producer: group.consumers for group in find_groups(make_llama(), WINDOWS, linears(make_llama()))
    }
    for layer in ("model.layers.0", "model.layers.1"):
        attention = tuple(f"{layer}.self_attn.{part}_proj" for part in "qkv")
        assert groups.pop(f"{layer}.input_layernorm") == attention
        both = (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
        assert groups.pop(f"{layer}.post_attention_layernorm") == both
        assert groups.pop(f"{layer}.mlp.up_proj") == (f"{layer}.mlp.down_proj",)
    assert groups == {}  # two query heads share a value head: no scale of their own can be divided out there


def test_norms_with_a_gain_of_one_plus_weight_and_values_of_single_heads_are_found():
    model = gemma()
    groups = {group.producer: group for group in find_groups(model, WINDOWS, linears(model))}
    assert groups["model.layers.0.input_layernorm"].shift == 1
    assert groups["model.layers.1.self_attn.v_proj"].consumers == ("model.layers.1.self_attn.o_proj",)


def test_where_a_residual_reads_the_norm_too_nothing_is_folded():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = BertModel(
        BertConfig(vocab_size=160, num_attention_heads=2, **sizes), add_pooling_layer=False
    ).eval()
    found = {group.producer.rpartition(".")[2] for group in find_groups(model, WINDOWS, linears(model))}
    assert found == {"value"}  # and GELU keeps the feed-forward from being scaled


@pytest.mark.parametrize("make", [uneven, gemma])
def test_folding_keeps_the_outputs(make):
    model, expected = make(), logits_of(make(), WINDOWS)
    folded = fold_awq(model, WINDOWS, linears(model), FORM, progress=False)
    assert folded and max(folded.values()) > 0
    assert not torch.equal(
        model.model.layers[0].mlp.down_proj.weight, make().model.layers[0].mlp.down_proj.weight
    )
    torch.testing.assert_close(
        logits_of(model, WINDOWS), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def inputs_of(model, name):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
    logits_of(model, WINDOWS)
    hook.remove()
    return seen


@pytest.mark.parametrize("make", [uneven, gemma])
def test_smoothing_divides_what_norms_make_by_the_root_of_its_size(make):
    name = "model.layers.1.mlp.gate_proj"
    expected, before = logits_of(make(), WINDOWS), inputs_of(make(), name)
    square = np.zeros(before[0].shape[-1])
    for rows in before:
        sizes = np.linalg.norm(rows.double().numpy(), axis=1)
        calm = np.minimum(3 * np.median(sizes) / sizes, 1)  # as `hushed` does
        square += ((rows.double().numpy() * calm[:, None]) ** 2).sum(0)
    size = np.sqrt(square / sum(map(len, before)))
    divisor = np.sqrt(size) / np.sqrt(np.sqrt(size).max() * np.sqrt(size).min())

    model = make()
    groups = fold_smoothing(model, WINDOWS, linears(model), 0.5, progress=False)
    assert {group.producer.rpartition(".")[2] for group in groups} <= {
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
    }
    found = inputs_of(model, name)
    for rows, old in zip(found, before, strict=True):
        np.testing.assert_allclose(rows.numpy(), old.numpy() / divisor, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(
        logits_of(model, WINDOWS), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_a_recipe_smooths_layers_in_blocks():
    model = uneven()
    (report,) = run(model, QuantizeInt8(PerBlock(32), block_smoothing=0.5), calibration=WINDOWS)
    assert "model.layers.0.input_layernorm" in report.folded and report.calibration_windows == len(WINDOWS)
    (report,) = run(uneven(), QuantizeInt8(PerBlock(32), smoothing=0.5), calibration=WINDOWS)
    assert report.folded == [] and report.calibration_windows == 0


def test_the_scales_are_the_papers():
    mean = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    for strength in (0.0, 0.5, 0.95):
        raw = np.array([0.5, 2.0, 8.0]) ** strength
        np.testing.assert_allclose(scales(mean, strength), raw / np.sqrt(raw.max() * raw.min()), rtol=1e-6)
    assert bool(scales(torch.zeros(3, dtype=torch.float64), 0.5).isfinite().all())


def test_the_best_strength_is_that_of_a_slow_loop():
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((6, 32)).astype(np.float32)
    size = np.exp(generator.standard_normal(32) * 1.5)
    square = size**2 * 1.6

    def error(strength):
        s = size**strength / np.sqrt((size**strength).max() * (size**strength).min())
        total = 0.0
        for row in weight * s.astype(np.float32):
            low, high = min(row.min(), 0), max(row.max(), 0)
            step = np.float32((high - low) / 15)
            zero = np.round(-low / step)
            codes = np.clip(np.round(row / step) + zero, 0, 15)
            made = (codes - zero) * step / s
            total += float((square * (made - row / s) ** 2).sum())
        return total

    errors = [error(strength) for strength in STRENGTHS]
    found = best_strength([torch.from_numpy(weight)], torch.from_numpy(size), torch.from_numpy(square), FORM)
    assert errors[STRENGTHS.index(found)] <= min(errors) * 1.02 and found > 0


def test_sizes_are_means_over_all_windows():
    model = make_llama()
    name = "model.layers.1.mlp.down_proj"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0][0])
    )
    logits_of(model, WINDOWS)
    handle.remove()
    rows = torch.cat(seen).double()
    mean, square = collect_sizes(model, WINDOWS, [name], progress=False)[name]
    torch.testing.assert_close(mean, rows.abs().mean(0))
    torch.testing.assert_close(square, rows.square().mean(0))


def test_a_model_with_unequal_features_loses_less():
    expected = logits_of(uneven(), WINDOWS).double().log_softmax(-1)

    def divergence(**options):
        model = uneven()
        (report,) = run(model, QuantizeInt4(block_size=32, fit="nearest", **options), calibration=WINDOWS)
        found = logits_of(model, WINDOWS).double().log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean()), report

    (plain, before), (folded, after) = divergence(), divergence(awq=True)
    assert folded < 0.8 * plain
    assert before.folded == [] and "model.layers.0.input_layernorm" in after.folded
