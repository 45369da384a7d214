"""Folders that cannot be read: every one is refused with its cause and a remedy."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from gemini.errors import CheckpointError
from gemini.model import load_checkpoint

Edit = Callable[..., None]


def refused(source: Path | str, pattern: str, **options: Any) -> None:
    """Loading must raise one line with a remedy whose text matches the pattern."""
    with pytest.raises(CheckpointError, match=pattern) as caught:
        load_checkpoint(source, **options)
    assert caught.value.cause and caught.value.remedy
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no checkpoint at")
    refused(str(tmp_path / "nowhere"), "nothing is downloaded")


def test_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "is empty")


def test_unknown_catalog_name_lists_the_catalog_and_the_nearest() -> None:
    refused("smolm2-135m", r"has gemini-nano, smollm2-135m, all-minilm.*Did you mean 'smollm2-135m'.*\.gguf")
    refused("zzz", r"catalog has .*smollm2-135m.*folder or to a \.gguf")


def test_hub_name_is_not_downloaded() -> None:
    refused("organisation/model", "nothing is downloaded")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_only(llama: Path, name: str) -> None:
    (llama / "model.safetensors").rename(llama / name)
    refused(llama, rf"only pickled weights \({name}\).*run any code.*Convert it to safetensors")


def test_file_that_is_no_gguf(llama: Path) -> None:
    refused(llama / "model.safetensors", "Pass the folder that holds it")


def test_config_without_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    refused(llama, "has no weights")


def test_weights_without_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    refused(llama, "no config.json")


def test_folder_with_gguf_points_to_the_file(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "x.gguf")
    refused(llama, r"Pass the file itself: .*x\.gguf")


def test_bundle_and_adapter_are_named_as_such(llama: Path, tmp_path: Path) -> None:
    (llama / "adapter_config.json").write_text("{}")
    refused(llama, "an adapter")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    refused(bundle, "compressed bundle")


@pytest.mark.parametrize("text", ["{", "[1]", "", "\x00", '{"a": NaN', "[" * 100_000])
def test_unreadable_config(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    refused(llama, r"config\.json (is not valid JSON|does not hold)")


def test_unknown_model_type(llama: Path, edit_json: Edit) -> None:
    edit_json(llama / "config.json", model_type="brandnew")
    refused(llama, "model type 'brandnew' is not part of transformers")


def test_remote_code_is_not_run(llama: Path, edit_json: Edit) -> None:
    (llama / "modeling_evil.py").write_text("raise SystemExit('executed')")
    auto_map = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    edit_json(llama / "config.json", model_type="evil", auto_map=auto_map)
    refused(llama, "remote code .* is not run")


def test_unknown_class_is_not_searched_in_the_folder(llama: Path, edit_json: Edit) -> None:
    edit_json(llama / "config.json", architectures=["EvilForCausalLM"])
    refused(llama, "'EvilForCausalLM' is not part of transformers")


def test_already_quantized_weights(llama: Path, edit_json: Edit) -> None:
    edit_json(llama / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(llama, "already quantized by gptq")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 64},
        {"intermediate_size": 96},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 65},
        {"vocab_size": 10**12},
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 2},
    ],
    ids=str,
)
def test_config_that_does_not_fit_the_weights(llama: Path, edit_json: Edit, changes: dict[str, Any]) -> None:
    edit_json(llama / "config.json", **changes)
    refused(llama, r"config|lacks|layer|weights")


def test_damaged_numbers_are_noticed(llama: Path) -> None:
    path = llama / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4096:] = b"\xff" * 4096  # fp32 NaN
    path.write_bytes(data)
    refused(llama, "not finite")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_safetensors(llama: Path, keep: float) -> None:
    path = llama / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refused(llama, r"model\.safetensors is truncated or corrupt")


def _with_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def _first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = header[sorted(name for name in header if name != "__metadata__")[0]]
    return entry


@pytest.mark.parametrize(
    "change",
    [
        lambda header: _first(header).update(dtype="F99"),
        lambda header: _first(header).update(shape=[1]),
        lambda header: _first(header).update(shape=[-1, -1]),
        lambda header: _first(header).update(shape="big"),
        lambda header: _first(header).update(data_offsets=[0, 2**60]),
        lambda header: _first(header).update(data_offsets=[10, 4]),
        lambda header: _first(header).pop("data_offsets"),
        lambda header: header.update(extra={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
        lambda header: header.pop(sorted(header)[1]),
        lambda header: header.update({sorted(header)[1]: 7}),
    ],
)
def test_malformed_safetensors_header(llama: Path, change: Callable[[dict[str, Any]], None]) -> None:
    _with_header(llama / "model.safetensors", change)
    refused(llama, r"model\.safetensors is truncated or corrupt")


def test_huge_header_length_allocates_nothing(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
    refused(llama, "its header claims")


def test_header_that_is_not_json(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"{{{{")
    refused(llama, "not valid JSON")


@pytest.fixture
def sharded(llama: Path) -> Path:
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    (llama / "model.safetensors").unlink()
    model.save_pretrained(llama, max_shard_size="20KB")
    return llama


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    shard.unlink()
    refused(sharded, f"{shard.name} named by .* is missing")


def test_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(sharded, re.escape(shard.name))


def test_tensor_missing_from_its_shard(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.extra.weight"] = next(iter(value["weight_map"].values()))
    index.write_text(json.dumps(value))
    refused(sharded, "lacks 1 tensors")


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin"]
)
def test_index_that_leaves_the_folder(sharded: Path, shard: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(sharded, "not a .safetensors file inside the folder")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_unreadable_index(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded, "index")


def test_missing_tokenizer(llama: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).unlink()
    refused(llama, "no tokenizer")


def test_damaged_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{")
    refused(llama, "tokenizer cannot be read")


def test_tokenizer_of_another_model(tiny: SimpleNamespace, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "small", tiny.llama_config(vocab_size=50), transformers.LlamaForCausalLM)
    refused(folder, "64 tokens and the model has 50 embeddings")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, r"mean \+ cls|cls \+ mean"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode_mean_tokens": False}, "no mode"),
        ({"pooling_mode": "attention"}, "attention"),
    ],
)
def test_pooling_without_a_graph(sentence: Path, flags: dict[str, Any], named: str) -> None:
    (sentence / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    refused(sentence, named)


@pytest.mark.parametrize("path", ["../outside", "/etc", "a/../../b"])
def test_module_path_that_leaves_the_folder(sentence: Path, path: str) -> None:
    entries = json.loads((sentence / "modules.json").read_text())
    entries[1]["path"] = path
    (sentence / "modules.json").write_text(json.dumps(entries))
    refused(sentence, "outside the checkpoint folder")


def test_dense_module_is_refused(sentence: Path) -> None:
    entries = json.loads((sentence / "modules.json").read_text())
    entries[2]["type"] = "sentence_transformers.models.Dense"
    (sentence / "modules.json").write_text(json.dumps(entries))
    refused(sentence, r"Transformer \+ Pooling \+ Dense")


@pytest.mark.parametrize("text", ["{", "{}", "[]", "[3]", '[{"path": ""}]'])
def test_unreadable_module_list(sentence: Path, text: str) -> None:
    (sentence / "modules.json").write_text(text)
    refused(sentence, r"modules\.json")


def test_missing_pooling_file(sentence: Path) -> None:
    (sentence / "1_Pooling" / "config.json").unlink()
    refused(sentence, "cannot be read")
