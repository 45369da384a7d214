"""Tiny random models of many architectures. Gains are random too: at 1 a wrong norm would pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from gemini.model.checkpoint import Checkpoint, Pooling
from gemini.model.gemini import GeminiConfig, GeminiForConditionalGeneration
from gemini.runtime import kernels

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LAYERS = ["sliding_attention", "full_attention"]
SMALL_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 101, "n_positions": 128}
SMALL_BERT = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 101}

DECODERS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, head_dim=16)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=16)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, head_dim=16, sliding_window=4)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL_GPT, bos_token_id=1, eos_token_id=2)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=4, layer_types=LAYERS)
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED)),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**GROUPED, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
    ),
    # A mask with a window that no layer uses; experts beside one that all tokens share.
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **GROUPED,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=96,
            num_experts=4,
            num_experts_per_tok=2,
        )
    ),
    # Sinks; experts with biases, a clipped gate and weights the other way round.
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**GROUPED, head_dim=16, sliding_window=4, num_local_experts=4, num_experts_per_tok=2)
    ),
}
ENCODERS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES, num_labels=3)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**SMALL_BERT)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**SIZES)),
    # Every other layer sees its neighbours alone.
    "modernbert": lambda: tf.ModernBertForSequenceClassification(
        tf.ModernBertConfig(
            **SIZES, cls_token_id=1, sep_token_id=2, local_attention=6, global_attn_every_n_layers=2
        )
    ),
}
CLIP_SIZES = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")} | {
    "num_attention_heads": 4
}
VISION: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    ),
    # Its size is that of a part of the configuration.
    "clip": lambda: tf.CLIPForImageClassification(
        tf.CLIPConfig(vision_config={**CLIP_SIZES, "image_size": 32, "patch_size": 8}, text_config=CLIP_SIZES)
    ),
    "convnext": lambda: tf.ConvNextForImageClassification(
        tf.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 32], image_size=32)
    ),
    # Attention over windows of the image, with a bias for each place in them.
    "swin": lambda: tf.SwinForImageClassification(
        tf.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
        )
    ),
}


def gemini(fusion: str, prototypes: int = 0) -> GeminiForConditionalGeneration:
    config = GeminiConfig(
        vocab_size=101,
        hidden_size=64,
        encoder_layers=3,
        decoder_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=16,
        image_channels=(8, 16, 32),
        max_position_embeddings=64,
        fusion=fusion,
        image_prototypes=prototypes,
    )
    model = GeminiForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(2)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):  # as after training: no statistic at its start value
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
    if prototypes:  # as after training: one is clearly the nearest, and it is as large as a token
        memory = model.get_encoder().image.prototypes
        torch.nn.init.normal_(memory.keys.weight, generator=generator)
        torch.nn.init.normal_(memory.values.weight, generator=generator)
    return model


def vit_gpt2() -> tf.VisionEncoderDecoderModel:
    sizes = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    vit = tf.ViTConfig(**sizes, num_attention_heads=4, image_size=16, patch_size=8)
    gpt = tf.GPT2Config(**SMALL_GPT, bos_token_id=1, eos_token_id=2)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return tf.VisionEncoderDecoderModel(config)


PAIR = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
# Position tables, sinusoids, and relative biases that no attention operator takes.
ENCODER_DECODERS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**PAIR)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**PAIR, scale_embedding=True)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=101, decoder_start_token_id=0
        )
    ),
    "gemini-early": lambda: gemini("early"),
    "gemini-late": lambda: gemini("late"),
    "gemini-hybrid": lambda: gemini("hybrid"),
    "gemini-prototypes": lambda: gemini("early", prototypes=100),  # no multiple of any block
    "vit-gpt2": lambda: vit_gpt2(),
}
# Not in any list that the exporter was written for: unequal caches, interleaved rotary, alibi, no positions.
OTHERS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**GROUPED)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**GROUPED)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES)),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=101, bos_token_id=1, eos_token_id=2)
    ),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=101, ffn_hidden_size=96
        )
    ),
    "openai-gpt": lambda: tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(**SMALL_GPT)),  # cannot be exported
    # Keys and values that are made from fewer numbers; experts beside one that all tokens share.
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4},
            moe_intermediate_size=32,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        )
    ),
}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that logits differ clearly between tokens; gains around 1, none of them 1."""
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for parameter in model.parameters():
        if parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model.eval().requires_grad_(False)


def as_checkpoint(model: tf.PreTrainedModel, family: str, pooling: Pooling | None = None) -> Checkpoint:
    """A checkpoint around a model in memory, as load_checkpoint would make it."""
    task = {
        "decoder": "text-generation",
        "encoder": "text-classification",
        "vision": "image-classification",
        "encoder-decoder": "text2text-generation",
    }[family]
    return Checkpoint(
        name="tiny",
        task="feature-extraction" if pooling else task,
        family=family,
        model=randomise(model),
        tokenizer=None,
        processor=None,
        pooling=pooling,
        context_length={"decoder": 128, "encoder": 120, "vision": None, "encoder-decoder": 64}[family],
        source={"kind": "test", "name": "tiny", "sha256": "0" * 64},
    )


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Checkpoint]:
    """name -> a tiny checkpoint of that architecture."""

    def make(name: str, pooling: Pooling | None = None) -> Checkpoint:
        for family, zoo in (
            ("decoder", DECODERS | OTHERS),
            ("encoder", ENCODERS),
            ("vision", VISION),
            ("encoder-decoder", ENCODER_DECODERS),
        ):
            if name in zoo:
                torch.manual_seed(0)
                return as_checkpoint(zoo[name](), family, pooling)
        raise KeyError(name)

    return make


@pytest.fixture(scope="session")
def words() -> tf.PreTrainedTokenizerFast:
    """One token a word, </s> at the end of every text; fits every tiny text model."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 101)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(params=kernels.instructions())
def instructions(request, monkeypatch):
    """Own kernels in each set of instructions that they can use on this processor."""
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param
