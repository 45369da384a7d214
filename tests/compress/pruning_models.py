"""Tiny models of several architectures with windows for them, for the tests of structured pruning."""

import numpy as np
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from gemini.model.gemini import GeminiConfig, GeminiForConditionalGeneration

_SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
IDS = [np.random.default_rng(seed).integers(3, 90, (1, 20)) for seed in range(3)]
PAIRS = [{"input_ids": ids, "decoder_input_ids": ids[:, ::-1].copy()} for ids in IDS]
PIXELS = [
    {"pixel_values": np.random.default_rng(seed).normal(size=(1, 1, 8, 8)).astype("float32")}
    for seed in range(3)
]


def windows_for(model: nn.Module) -> list:
    if model.main_input_name == "pixel_values":
        return PIXELS
    return PAIRS if model.config.is_encoder_decoder else IDS


def ready(model: nn.Module) -> nn.Module:
    """Weights large enough that no part vanishes beside the residual stream, biases that are not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                weight.copy_(0.1 * noise)
    return model.eval().requires_grad_(False)


def llama(**changes) -> nn.Module:
    """Eight queries, two to each of four keys."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    return ready(LlamaForCausalLM(LlamaConfig(**{**_SIZES, **heads, **changes})))


def gemma() -> nn.Module:
    """Queries and keys are normed a head; blocks with and without a window."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return ready(Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, **heads, sliding_window=4, layer_types=kinds)))


def phi() -> nn.Module:
    """Query, key and value in one matrix, gate and up in another."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return ready(Phi3ForCausalLM(Phi3Config(**_SIZES, **heads)))


def gpt_neox() -> nn.Module:
    """Query, key and value of each head next to each other; attention and feed-forward side by side."""
    return ready(GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES, num_attention_heads=4)))


def gpt2() -> nn.Module:
    """Transposed weights, and a width that the configuration leaves open (128)."""
    return ready(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=96, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=1
            )
        )
    )


def bert() -> nn.Module:
    return ready(BertForMaskedLM(BertConfig(**_SIZES, num_attention_heads=4)))


def modern_bert() -> nn.Module:
    """The first block has one norm less than the others; attention looks far in every third block."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    return ready(ModernBertForMaskedLM(ModernBertConfig(**_SIZES, **ids, num_attention_heads=4)))


def gpt_oss() -> nn.Module:
    """Attention sinks, one a head in every block; experts that are no linear layers."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "num_experts_per_tok": 2}
    return ready(GptOssForCausalLM(GptOssConfig(**_SIZES, **heads, num_local_experts=4, pad_token_id=0)))


def vit() -> nn.Module:
    sizes = {key: value for key, value in _SIZES.items() if key != "vocab_size"}
    patches = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    return ready(ViTForImageClassification(ViTConfig(**sizes, **patches, num_attention_heads=4)))


def bart() -> nn.Module:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 64}
    return ready(BartForConditionalGeneration(BartConfig(vocab_size=96, d_model=32, **heads, **layers)))


def t5(**changes) -> nn.Module:
    """The first block holds a table of biases a head that all blocks use."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    return ready(T5ForConditionalGeneration(T5Config(vocab_size=96, **{**sizes, **changes})))


def gemini() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return ready(
        GeminiForConditionalGeneration(GeminiConfig(vocab_size=96, image_channels=(4, 8, 16), **sizes))
    )
