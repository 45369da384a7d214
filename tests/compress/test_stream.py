"""Second moments block by block against hooks on whole models, with what has changed so far."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from gemini.compress.calibrate import BATCH_TOKENS, LOUDEST, batches, hushed
from gemini.compress.stream import find_stacks, second_moment, stream
from gemini.model.gemini import GeminiConfig, GeminiForConditionalGeneration

WINDOWS = [np.random.default_rng(seed).integers(3, 90, (1, 20)) for seed in range(3)]
PAIRS = [{"input_ids": ids, "decoder_input_ids": ids[:, ::-1].copy()} for ids in WINDOWS]


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_attention_heads=2, num_key_value_heads=1, **sizes))


def gemma() -> nn.Module:
    """Local and global layers: blocks are called with different masks."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16}
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=96,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            **sizes,
        )
    )


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return BertModel(BertConfig(vocab_size=96, num_attention_heads=2, **sizes))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=3, n_head=2))


def bart() -> nn.Module:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return BartForConditionalGeneration(BartConfig(vocab_size=96, d_model=32, **heads, **layers))


def t5() -> nn.Module:
    """The first block makes the position biases that all others get."""
    return T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    )


def own() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    return GeminiForConditionalGeneration(GeminiConfig(vocab_size=96, image_channels=(4, 8, 16), **sizes))


def linears(model: nn.Module) -> list[str]:
    kinds = ("Linear", "Conv1D")
    return [name for name, module in model.named_modules() if type(module).__name__ in kinds]


def inputs_of(model: nn.Module, name: str, windows: list) -> torch.Tensor:
    """Rows (N, K) that a layer gets from whole runs of the model, the longest of each batch scaled down."""
    rows: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: rows.append(hushed(args[0].detach().flatten(0, -2)))
    )
    with torch.no_grad():
        for window in batches(windows):
            feed = window if isinstance(window, dict) else {"input_ids": window}
            model(**{key: torch.as_tensor(value) for key, value in feed.items()})
    handle.remove()
    return torch.cat(rows).double()


@pytest.mark.parametrize(
    ("make", "windows", "stacks"),
    [
        (llama, WINDOWS, 1),
        (gemma, WINDOWS, 1),
        (bert, WINDOWS, 1),
        (gpt2, WINDOWS, 1),
        (bart, PAIRS, 2),
        (t5, PAIRS, 2),
        (own, PAIRS, 2),
    ],
)
def test_a_block_sees_what_changed_before_it(make, windows, stacks):
    torch.manual_seed(0)
    model = make().eval()
    names = linears(model)
    assert len(find_stacks(model, names)) == stacks
    seen: list[str] = []
    for block in stream(model, windows, names, progress=False):
        assert block.hessians
        for name, found in block.hessians.items():
            x = inputs_of(model, name, windows)
            # Products in float32, and the block runs alone instead of inside of the model.
            torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        for name in block.hessians:
            with torch.no_grad():
                model.get_submodule(name).weight.mul_(0.9).add_(0.01)
        seen += block.hessians
    inside = [
        name for name in names if any(f"{path}." in f"{name}." for path, _ in find_stacks(model, names))
    ]
    assert sorted(seen) == sorted(inside)


def test_layers_that_are_not_named_are_left_out():
    model = llama().eval()
    blocks = list(stream(model, WINDOWS, ["model.layers.1.mlp.up_proj"], progress=False))
    assert [list(block.hessians) for block in blocks] == [[], ["model.layers.1.mlp.up_proj"], []]


def test_one_block_is_no_stack():
    assert find_stacks(nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)])}), ["a.0"]) == []


def test_only_the_loudest_rows_are_scaled_down():
    rows = torch.randn(101, 8, generator=torch.Generator().manual_seed(0))
    rows = rows / rows.norm(dim=1, keepdim=True)
    rows[0] *= 500
    rows[1] = 0
    made = hushed(rows)
    torch.testing.assert_close(made[1:], rows[1:])
    torch.testing.assert_close(made[0], rows[0] / 500 * LOUDEST)
    assert not hushed(torch.zeros(3, 4)).any()


def test_windows_of_one_length_become_batches_up_to_a_size():
    length = BATCH_TOKENS // 2
    ids = [np.full((1, length), row) for row in range(3)]
    pair = {"input_ids": ids[0]}
    made = batches([*ids, pair, ids[1], np.full((1, 7), 9)])
    shapes = [
        window["input_ids"].shape if isinstance(window, dict) else tuple(window.shape) for window in made
    ]
    assert shapes == [(2, length), (1, length), (1, length), (1, length), (1, 7)]
    assert made[0][:, 0].tolist() == [0, 1] and made[2] is pair


def test_the_moment_of_a_head_needs_no_logits():
    torch.manual_seed(0)
    model = llama().eval()
    x = inputs_of(model, "lm_head", WINDOWS)
    logits = model(torch.as_tensor(WINDOWS[0])).logits
    found = second_moment(model, WINDOWS, "lm_head")
    # Products in float32.
    torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(torch.as_tensor(WINDOWS[0])).logits, logits)
    assert second_moment(model, [], "lm_head") is None
