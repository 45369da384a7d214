"""Tiny checkpoints with random weights, saved once per session and copied where a test damages one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

# Read when transformers is imported, hence before.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch
import transformers

WORDS = ["[UNK]", "<pad>", "</s>", "hello", "world", "edge", "model", "small", *(f"w{i}" for i in range(56))]
TEXT_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def word_tokenizer() -> Any:
    """A fast tokenizer of 64 whole words; `</s>` ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="<pad>", eos_token="</s>"
    )


def save(folder: Path, config: Any, cls: Any, **arguments: Any) -> Path:
    """Save a seeded random model with the word tokenizer."""
    torch.manual_seed(0)
    model = cls(config, **arguments)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def bert_config(**changes: Any) -> Any:
    return transformers.BertConfig(
        **{**TEXT_SIZE, "vocab_size": 64, "max_position_embeddings": 40, **changes}
    )


def llama_config(**changes: Any) -> Any:
    defaults = {**TEXT_SIZE, "vocab_size": 64, "max_position_embeddings": 48, "num_key_value_heads": 1}
    return transformers.LlamaConfig(**{**defaults, "eos_token_id": 5, **changes})


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The helpers of this file (test modules cannot import a conftest)."""
    return SimpleNamespace(
        save=save,
        bert_config=bert_config,
        llama_config=llama_config,
        word_tokenizer=word_tokenizer,
        write_gguf=write_gguf,
    )


@pytest.fixture(scope="session")
def _llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny") / "llama", llama_config(), transformers.LlamaForCausalLM)


@pytest.fixture(scope="session")
def _bert_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "classifier"
    return save(folder, bert_config(num_labels=3), transformers.BertForSequenceClassification)


@pytest.fixture(scope="session")
def _masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny") / "masked", bert_config(), transformers.BertForMaskedLM)


@pytest.fixture(scope="session")
def _vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "vit"
    config = transformers.ViTConfig(**TEXT_SIZE, image_size=32, patch_size=8, num_labels=4)
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.logging.set_verbosity_error()
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def _copies(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / source.name))


@pytest.fixture
def llama(_llama: Path, tmp_path: Path) -> Path:
    return _copies(_llama, tmp_path)


@pytest.fixture
def classifier(_bert_classifier: Path, tmp_path: Path) -> Path:
    return _copies(_bert_classifier, tmp_path)


@pytest.fixture
def masked(_masked: Path, tmp_path: Path) -> Path:
    return _copies(_masked, tmp_path)


@pytest.fixture
def vit(_vit: Path, tmp_path: Path) -> Path:
    return _copies(_vit, tmp_path)


@pytest.fixture
def sentence(masked: Path) -> Path:
    """The masked language model as a sentence-transformers folder: mean pooling, normalized, 20 tokens."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (masked / "modules.json").write_text(json.dumps(entries))
    (masked / "1_Pooling").mkdir()
    flags = {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
    }
    (masked / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    (masked / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": false}')
    return masked


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """``edit_json(path, key=value, ...)`` changes keys of a JSON file; None removes one."""

    def edit(path: Path, **changes: Any) -> None:
        value = json.loads(path.read_text())
        value.update(changes)
        path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))

    return edit


@pytest.fixture(scope="session")
def _gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


@pytest.fixture
def gguf_file(_gguf_bytes: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(_gguf_bytes)
    return path


def write_gguf(path: Path, architecture: str = "llama", **counts: int) -> None:
    """A llama GGUF of one layer: width 32, 2 heads, 64 tokens, fp32 and Q8_0 tensors, tied head."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(48)
    writer.add_embedding_length(counts.get("width", 32))
    writer.add_block_count(counts.get("layers", 1))
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    tokens = ["<unk>", "<s>", "</s>", "<end>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd"]
    tokens += [chr(0x100 + i) for i in range(64 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 3] + [1] * 60)
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (64, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        data = random.standard_normal(shape).astype(np.float32) * 0.1
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn_" in name and len(shape) == 2 else None
        writer.add_tensor(
            f"{name}.weight", gguf.quants.quantize(data, kind) if kind else data, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
