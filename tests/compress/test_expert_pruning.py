"""Fewer experts: the same answers as a router that cannot reach those left out, chosen by what they add."""

import copy

import numpy as np
import pytest
import torch
from test_experts import EXPERTS, SIZES, WINDOWS, gpt_oss, mixtral
from torch.nn import functional
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralForCausalLM

from gemini.compress.expert_pruning import expert_saliency, prune_experts
from gemini.errors import RecipeError

IDS = torch.from_numpy(np.concatenate(WINDOWS[:3]))


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_saliency_is_what_a_slow_loop_adds_up():
    model = mixtral()
    stack, seen = model.get_submodule(EXPERTS), []
    handle = stack.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        for window in WINDOWS:
            model(torch.from_numpy(window))
    handle.remove()
    added: dict[int, list[float]] = {expert: [] for expert in range(4)}
    for hidden, chosen, weights in seen:
        for token, picks, shares in zip(hidden, chosen.tolist(), weights.tolist(), strict=True):
            for expert, share in zip(picks, shares, strict=True):
                gate, up = (stack.gate_up_proj[expert] @ token).chunk(2)
                made = stack.down_proj[expert] @ (functional.silu(gate) * up)
                added[expert].append(share * float(made.norm()))
    found, picked = expert_saliency(model, WINDOWS, progress=False)[EXPERTS]
    assert picked == 2
    expected = torch.tensor([sum(each) / len(each) for each in added.values()], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def _without(model, kept):
    """The same model with a router that gives all other experts a probability of nothing."""
    made = copy.deepcopy(model)
    for stack, indices in kept.items():
        block = made.get_submodule(stack.rpartition(".")[0])
        gone = [expert for expert in range(4) if expert not in indices]
        if hasattr(block, "router"):
            block.router.bias[gone] = -1e9
            continue

        def forward(hidden, gate=block.gate, gone=gone):
            logits = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T
            logits[:, gone] = -torch.inf
            best, picks = logits.softmax(-1).topk(2)
            return logits, best / best.sum(-1, keepdim=True), picks

        block.gate.forward = forward
    return made


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_what_stays_answers_as_if_the_others_were_out_of_reach(make, tmp_path):
    model = make()
    before = _logits(model)
    fewer = prune_experts(model, WINDOWS, fraction=0.25, progress=False)
    report = fewer.report
    assert {len(kept) for kept in report.kept.values()} == {3} and len(report.kept) == 2
    for stack, kept in report.kept.items():
        scores = report.saliency[stack]
        assert min(scores[expert] for expert in kept) >= min(scores) and scores.index(min(scores)) not in kept
    torch.testing.assert_close(
        _logits(fewer.model), _logits(_without(model, report.kept)), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(_logits(model), before, atol=0, rtol=0)  # left as it was
    assert report.config == {"num_local_experts": 3}
    assert report.parameters_after == sum(p.numel() for p in fewer.model.parameters())
    fewer.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(_logits(again), _logits(fewer.model), atol=1e-5, rtol=1e-5)


def test_what_stands_beside_experts_is_cut_with_them():
    """DeepSeek corrects its router's choice by a buffer with an entry for each expert."""
    config = DeepseekV3Config(
        **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id")},
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.layers[1].mlp.gate.e_score_correction_bias)
    fewer = prune_experts(model, WINDOWS, fraction=0.5, progress=False)
    (kept,) = fewer.report.kept.values()
    gate, cut = model.model.layers[1].mlp.gate, fewer.model.model.layers[1].mlp.gate
    assert len(kept) == 3 and fewer.report.config == {"n_routed_experts": 3}
    assert torch.equal(cut.e_score_correction_bias, gate.e_score_correction_bias[list(kept)])
    assert torch.equal(cut.weight, gate.weight[list(kept)])


@pytest.mark.parametrize(
    ("fraction", "reason"),
    [(0.0, "share of experts"), (1.0, "share of experts"), (0.05, "is none"), (0.75, "a token picks 2")],
)
def test_shares_that_cannot_be_are_refused(fraction, reason):
    with pytest.raises(RecipeError, match=reason):
        prune_experts(mixtral(), WINDOWS, fraction=fraction, progress=False)


def test_models_without_experts_or_with_others_are_refused():
    from small_models import make_llama

    with pytest.raises(RecipeError, match="has no experts"):
        prune_experts(make_llama(), WINDOWS, fraction=0.25, progress=False)
    model: MixtralForCausalLM = mixtral()
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = torch.nn.GELU()
    with pytest.raises(RecipeError, match="MixtralExperts computes is not known"):
        prune_experts(model, WINDOWS, fraction=0.25, progress=False)
