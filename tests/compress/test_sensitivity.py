"""The Fisher diagonal against sums over every label there is, and against divergences that are measured."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from gemini.compress.calibrate import collect_input_moments
from gemini.compress.sensitivity import expected_loss, output_fisher

WINDOWS = [np.random.default_rng(seed).integers(0, 24, (1, 6)) for seed in range(2)]


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "initializer_range": 0.3}
    config = LlamaConfig(vocab_size=24, num_attention_heads=2, num_key_value_heads=1, **sizes)
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


def exact_fisher(model, name):
    """sum_t sum_label p(label) g^2 at each position, by one gradient for each label of each position."""
    total, count = 0.0, 0
    layer = model.get_submodule(name)
    for window in WINDOWS:
        kept = []
        handle = layer.register_forward_hook(
            lambda _m, _a, y, kept=kept: kept.append(y.detach().requires_grad_()) or kept[-1]
        )
        logs = model(torch.as_tensor(window)).logits[0].log_softmax(-1)
        handle.remove()
        for row in logs:
            for log in row:
                (gradient,) = torch.autograd.grad(log, kept[0], retain_graph=True)
                total = total + log.detach().exp() * gradient[0].square().sum(0)
        count += window.size
    return total / count


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"])
def test_the_mean_over_draws_is_the_sum_over_labels(name):
    model = llama()
    draws = torch.stack(
        [output_fisher(model, WINDOWS, [name], seed=seed, progress=False)[name] for seed in range(120)]
    )
    # Standard error of the mean over draws; three of them for 24 outputs at once.
    slack = 4 * draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact_fisher(model, name)).abs() <= slack).all()


def test_all_layers_at_once_are_each_alone():
    model = llama()
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    together = output_fisher(model, WINDOWS, names, progress=False)
    for name in names:
        torch.testing.assert_close(
            together[name], output_fisher(model, WINDOWS, [name], progress=False)[name]
        )
    assert not any(module._forward_hooks for module in model.modules())


def test_the_expected_loss_is_the_divergence_that_comes():
    model, name = llama(), "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(name)
    weight = layer.weight.detach().clone()
    (moments,) = collect_input_moments(model, WINDOWS, [name], progress=False).values()
    fisher = exact_fisher(model, name)
    generator = torch.Generator().manual_seed(0)
    before = [model(torch.as_tensor(window)).logits.log_softmax(-1) for window in WINDOWS]
    expected, measured = [], []
    for _ in range(60):
        changed = weight + 1e-3 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        layer.weight.copy_(changed)
        after = [model(torch.as_tensor(window)).logits.log_softmax(-1) for window in WINDOWS]
        found = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(before, after, strict=True)]
        measured.append(float(torch.stack(found).mean()))
        expected.append(expected_loss(weight, changed, fisher, moments))
    # Inputs and gradients are not quite independent, so the mean is off by a factor near 1.
    assert 0.6 < np.mean(expected) / np.mean(measured) < 1.6


def test_a_model_without_logits_is_judged_by_its_states():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = BertModel(BertConfig(vocab_size=24, num_attention_heads=2, **sizes), add_pooling_layer=False)
    model = model.double().eval().requires_grad_(False)
    name = "encoder.layer.1.output.dense"
    draws = torch.stack(
        [output_fisher(model, WINDOWS, [name], seed=seed, progress=False)[name] for seed in range(120)]
    )
    # y = LayerNorm(x + r): the sum over all outputs of the squared Jacobian, at each position.
    exact, count = torch.zeros(16, dtype=torch.float64), 0
    for window in WINDOWS:
        kept = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda _m, _a, y, kept=kept: kept.append(y.detach().requires_grad_()) or kept[-1]
        )
        states = model(torch.as_tensor(window)).last_hidden_state[0]
        handle.remove()
        for row in states:
            for value in row:
                (gradient,) = torch.autograd.grad(value, kept[0], retain_graph=True)
                exact += gradient[0].square().sum(0)
        count += window.size
    assert ((draws.mean(0) - exact / count).abs() <= 4 * draws.std(0) / 120**0.5).all()
