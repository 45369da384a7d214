"""Experts as two tall layers: the same numbers as transformers' own stacks, and as one expert at a time."""

import math

import numpy as np
import pytest
import torch
import transformers as tf
from torch.nn import functional

from gemini.compress.apply import run_recipe, select_mixed
from gemini.compress.calibrate import collect_input_moments
from gemini.compress.dense import dense_weights
from gemini.compress.experts import Experts, Gate, PackedStack, StackedLinear, find_gate, open_experts
from gemini.compress.layers import Integers, quantized
from gemini.compress.plan import FORMATS, plan_formats, scan_formats
from gemini.compress.recipe import Recipe
from gemini.compress.select import select_layers
from gemini.compress.sensitivity import output_fisher
from gemini.compress.specs import QuantizeInt4, QuantizeMixed, QuantizeNF4
from gemini.compress.stream import second_moment

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
WINDOWS = [np.random.default_rng(seed).integers(3, 97, (1, 24)) for seed in range(6)]
EXPERTS = "model.layers.0.mlp.experts"


def mixtral() -> tf.PreTrainedModel:
    return _random(tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES)))


def gpt_oss() -> tf.PreTrainedModel:
    return _random(tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES)))


def _random(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.3 * noise)
    return model.eval().requires_grad_(False)


def _checkpoint(model):
    from gemini.model.checkpoint import Checkpoint

    source = {"kind": "test", "name": "tiny", "sha256": "0" * 64}
    return Checkpoint("tiny", "text-generation", "decoder", model, None, None, None, 64, source)


def _clipped(limit: float):
    def apply(both: torch.Tensor) -> torch.Tensor:
        g, l = both.chunk(2, -1)  # noqa: E741
        return functional.silu(g.clamp(max=limit)) * l.clamp(-limit, limit)

    return apply


def _of_two(function):
    return lambda both: function(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1]


@pytest.mark.parametrize(
    ("apply", "expected"),
    [
        (_of_two(functional.silu), Gate()),
        (_clipped(5.0), Gate(limit=5.0)),
        (_of_two(lambda g: g * torch.sigmoid(1.702 * g)), Gate(alpha=1.702)),
        (_of_two(functional.gelu), None),
        (_of_two(functional.relu), None),
        (_of_two(torch.sigmoid), None),
        (lambda both: both.chunk(2, -1)[0], None),
    ],
)
def test_gate_is_found_by_trying_or_refused(apply, expected):
    assert find_gate(apply, concatenated=True) == expected


def test_gate_of_alternating_parts():
    def apply(both):
        g, l = both[..., ::2].clamp(max=7), both[..., 1::2].clamp(-7, 7)  # noqa: E741
        return (l + 1) * g * torch.sigmoid(1.702 * g)

    assert find_gate(apply, concatenated=False) == Gate(1.702, 1.0, 7.0)
    assert find_gate(apply, concatenated=True) is None


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_opened_experts_compute_what_the_model_did(make):
    model = make()
    ids = torch.from_numpy(np.concatenate(WINDOWS[:2]))
    with torch.no_grad():
        expected = model(ids).logits
        assert open_experts(model) == [EXPERTS, EXPERTS.replace("0", "1")]
        found = model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert open_experts(model) == []  # nothing is left to open


def test_experts_equal_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(3 * 8, 6, generator=generator), torch.randn(3 * 6, 4, generator=generator)
    up_bias, down_bias = torch.randn(24, generator=generator), torch.randn(18, generator=generator)
    gate = Gate(1.5, 0.5, 1.0)
    experts = Experts(StackedLinear(up, up_bias, 3), StackedLinear(down, down_bias, 3), gate)
    hidden = torch.randn(5, 6, generator=generator)
    chosen = torch.tensor([[0, 2], [2, 0], [2, 1], [0, 1], [2, 0]])
    weights = torch.rand(5, 2, generator=generator)
    expected = torch.zeros(5, 6)
    for token in range(5):
        for place in range(2):
            expert = int(chosen[token, place])
            both = up[8 * expert : 8 * expert + 8] @ hidden[token] + up_bias[8 * expert : 8 * expert + 8]
            made = []
            for g, l in zip(both[::2].tolist(), both[1::2].tolist(), strict=True):  # noqa: E741
                g, l = min(g, 1.0), max(-1.0, min(l, 1.0))  # noqa: E741
                made.append(g / (1 + math.exp(-1.5 * g)) * (l + 0.5))
            rows = slice(6 * expert, 6 * expert + 6)
            expected[token] += weights[token, place] * (down[rows] @ torch.tensor(made) + down_bias[rows])
    torch.testing.assert_close(experts(hidden, chosen, weights), expected, atol=1e-5, rtol=1e-5)


def test_every_expert_is_rounded_as_it_would_be_alone():
    model = mixtral()
    stack = model.get_submodule(EXPERTS)
    whole = stack.gate_up_proj.clone()
    spec = QuantizeInt4(block_size=16, symmetric=True, fit="nearest", embedding_bits=32)
    (report,) = run_recipe(_checkpoint(model), Recipe("test", (spec,)), None, progress=False)
    names = [layer.name for layer in report.layers if layer.kind == "experts"]
    assert names[:2] == [f"{EXPERTS}.gate_up", f"{EXPERTS}.down"] and len(names) == 4
    packed = model.get_submodule(f"{EXPERTS}.gate_up")
    assert isinstance(packed, PackedStack)
    found = packed.layer.dequantized().unflatten(0, (4, -1))
    for expert in range(4):
        for part, rows in enumerate(whole[expert].chunk(2)):  # gates, then linear parts; here they alternate
            alone = quantized(rows, Integers(4, 16)).dequantized()
            torch.testing.assert_close(found[expert][part::2], alone, atol=0, rtol=0)
    ids = torch.from_numpy(WINDOWS[0])
    with torch.no_grad():
        expected = model(ids).logits
        with dense_weights(model):
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_two_products_stay_together():
    model = mixtral()
    open_experts(model)
    selection = select_layers(model, 16, ("*0.mlp.experts.down",), None)
    reasons = {each.name: each.reason for each in selection.skipped}
    assert "recipe skips" in reasons[f"{EXPERTS}.down"]
    assert "the other product" in reasons[f"{EXPERTS}.gate_up"]
    assert EXPERTS.replace("0", "1") + ".down" in selection.linears
    nf4 = QuantizeNF4(block_size=64, embedding_bits=32)
    (report,) = run_recipe(_checkpoint(model), Recipe("test", (nf4,)), None, progress=False)
    assert not any("experts" in layer.name for layer in report.layers)
    assert any("no operator" in each.reason for each in report.skipped if "experts" in each.name)


def test_rows_that_fill_no_block_stay_float():
    sizes = {**SIZES, "intermediate_size": 40}
    model = _random(tf.MixtralForCausalLM(tf.MixtralConfig(**sizes)))
    open_experts(model)
    reasons = {each.name: each.reason for each in select_layers(model, 32, (), None).skipped}
    assert "fill their 40 inputs" in reasons[f"{EXPERTS}.down"] and f"{EXPERTS}.gate_up" in reasons


def test_moments_of_experts_are_those_of_all_their_tokens():
    model = mixtral()
    seen = []
    handle = model.get_submodule(EXPERTS).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for window in WINDOWS:
            model(torch.from_numpy(window))
    handle.remove()
    rows = torch.cat([each.reshape(-1, 32) for each in seen])
    open_experts(model)
    name = f"{EXPERTS}.gate_up"
    found = second_moment(model, WINDOWS, name)
    # No row is hushed where none is much longer than the median one.
    assert float(rows.norm(dim=1).max()) < 3 * float(rows.norm(dim=1).median())
    torch.testing.assert_close(found, (rows.T @ rows / len(rows)).double(), atol=1e-4, rtol=1e-4)
    diagonal = collect_input_moments(model, WINDOWS, [name], progress=False)[name]
    torch.testing.assert_close(diagonal, found.diagonal(), atol=1e-4, rtol=1e-4)


def test_gptq_rounds_experts_better_than_nearest_codes_do():
    lost = {}
    ids = torch.from_numpy(np.random.default_rng(99).integers(3, 97, (4, 24)))
    with torch.no_grad():
        expected = mixtral()(ids).logits.log_softmax(-1)
    for gptq in (False, True):
        model = mixtral()
        spec = QuantizeInt4(block_size=16, fit="nearest", gptq=gptq, embedding_bits=32)
        run_recipe(_checkpoint(model), Recipe("test", (spec,)), WINDOWS, progress=False)
        assert isinstance(model.get_submodule(f"{EXPERTS}.down"), PackedStack)
        with torch.no_grad():
            found = model(ids).logits.log_softmax(-1)
        lost[gptq] = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert lost[True] < 0.95 * lost[False]


def test_fisher_of_an_expert_is_that_of_its_own_rows():
    model = mixtral()
    open_experts(model)
    name = f"{EXPERTS}.down"
    found = output_fisher(model, WINDOWS[:1], [name], progress=False)[name]
    # By hand: the gradient with respect to each expert's output rows, in one run.
    stack, kept = model.get_submodule(name), []

    def keep(_module, args, output):
        leaf = output.detach().requires_grad_()
        kept.append((leaf, args[1]))
        return leaf

    handle = stack.register_forward_hook(keep)
    with torch.enable_grad():
        logits = model(torch.from_numpy(WINDOWS[0])).logits.flatten(0, -2).log_softmax(-1)
        labels = torch.multinomial(logits.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
        logits.gather(1, labels).sum().backward()
    handle.remove()
    leaf, counts = kept[0]
    start, expected = 0, []
    for count in counts:
        expected.append(leaf.grad[start : start + count].double().square().sum(0) / len(leaf))
        start += count
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-9, rtol=1e-4)


def test_a_plan_gives_both_products_one_format():
    model = mixtral()
    open_experts(model)
    scan = scan_formats(model, select_mixed(model, QuantizeMixed()), WINDOWS, progress=False)
    plan = plan_formats(scan, target_bpw=6.0)
    for layer in range(2):
        pair = [plan.formats[EXPERTS.replace("0", str(layer)) + key] for key in (".gate_up", ".down")]
        assert pair[0] == pair[1]
    stored = 8 * plan.bytes / scan.parameters
    assert stored <= 6.0 and plan.bits_per_weight == pytest.approx(stored)
    formats = {f"{EXPERTS}.down": "int8-64", f"{EXPERTS}.gate_up": "int4-32"}
    spec = QuantizeMixed(target_bpw=6.0, formats=formats)
    (report,) = run_recipe(_checkpoint(model), Recipe("test", (spec,)), WINDOWS, progress=False)
    assert {layer.name: layer.bits for layer in report.layers} == {
        f"{EXPERTS}.gate_up": FORMATS["int8-64"].bits,
        f"{EXPERTS}.down": FORMATS["int8-64"].bits,
    }
