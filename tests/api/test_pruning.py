"""`gemini-edge prune`: a smaller checkpoint that loads, compresses and says what it lost."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import gemini
from gemini.cli import main
from gemini.errors import UsageError
from gemini.model.checkpoint import load_checkpoint
from gemini.pipeline import compress_model
from gemini.pruning import prune_checkpoint


@pytest.fixture(scope="module")
def llama(gemini_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=400, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    gemini.GeminiTokenizer.from_pretrained(gemini_folder).save_pretrained(path)
    return path


def test_a_pruned_generator_is_a_checkpoint_that_compresses(llama, tmp_path, capsys):
    out = tmp_path / "small"
    arguments = [
        "prune",
        str(llama),
        "--layers",
        "0.25",
        "--width",
        "0.5",
        "--heads",
        "0.5",
        "--output",
        str(out),
    ]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = AutoModelForCausalLM.from_pretrained(out)
    config = model.config
    assert (config.num_hidden_layers, config.intermediate_size, config.num_key_value_heads) == (3, 64, 1)
    assert report["after"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["before"]["parameters"] == sum(
        p.numel() for p in load_checkpoint(str(llama)).model.parameters()
    )
    assert {each["name"].rsplit(".", 1)[1] for each in report["refitted"]} <= {"o_proj", "down_proj"}
    assert report["refitted"] and all(each["after"] < each["before"] for each in report["refitted"])
    assert report["after"]["perplexity"] > 0 and report == {
        **json.loads((out / "pruning.json").read_text()),
        "checkpoint": str(out),
    }
    bundle = compress_model(str(out), tmp_path / "bundle", "fp32", progress=False)
    assert bundle["table"][-1]["perplexity"] == pytest.approx(report["after"]["perplexity"], rel=1e-3)
    assert main(arguments) == 2 and "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0 and "parameters" in capsys.readouterr().out


def test_tokens_that_a_corpus_never_uses_go_and_its_text_stays(llama, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The statement is an expression. " * 400)
    out = tmp_path / "small"
    report = prune_checkpoint(str(llama), out, vocabulary=[str(corpus)], progress=False)
    (cut,) = report["cuts"]
    before, after = load_checkpoint(str(llama)), load_checkpoint(str(out))
    assert cut["tokens_after"] < cut["tokens_before"] == 400
    assert after.model.get_input_embeddings().weight.shape[0] == cut["tokens_after"]
    text = "The statement is an expression."
    assert after.tokenizer.tokenize(text) == before.tokenizer.tokenize(text)
    for other in ("Zebra qux! 你好 🙂", "\t\n  x"):
        assert after.tokenizer.decode(after.tokenizer(other)["input_ids"]) == other
    assert not list(tmp_path.glob(".small-*"))


def test_an_image_classifier_is_pruned_on_pictures(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **sizes)).save_pretrained(
        tmp_path / "vit"
    )
    processor = gemini.GeminiImageProcessor(size={"height": 16, "width": 16})
    table = processor.to_dict() | {"image_processor_type": "ViTImageProcessor"}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(table))
    report = prune_checkpoint(
        str(tmp_path / "vit"), tmp_path / "small", width=0.5, layers=0.5, progress=False
    )
    assert [cut["config"] for cut in report["cuts"]] == [{"num_hidden_layers": 2}, {"intermediate_size": 32}]
    assert report["refitted"] == []
    assert report["before"]["logit_difference"] == 0 < report["after"]["logit_difference"]


def test_a_mixture_loses_experts_and_compresses(gemini_folder, tmp_path, capsys):
    source, out = tmp_path / "mixtral", tmp_path / "fewer"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(
        vocab_size=400, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes
    )
    MixtralForCausalLM(config).save_pretrained(source)
    gemini.GeminiTokenizer.from_pretrained(gemini_folder).save_pretrained(source)
    assert main(["prune", str(source), "--experts", "0.25", "--output", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (cut,) = report["cuts"]
    assert cut["type"] == "experts" and {len(kept) for kept in cut["kept"].values()} == {3}
    assert AutoModelForCausalLM.from_pretrained(out).config.num_local_experts == 3
    compress_model(str(out), str(tmp_path / "bundle"), recipe="int4", progress=False)
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text("utf-8"))
    assert "com.microsoft::QMoE" in manifest["requirements"]["operators"]


def test_nothing_to_cut_is_refused(llama, tmp_path):
    with pytest.raises(UsageError, match="Nothing is to be cut"):
        prune_checkpoint(str(llama), tmp_path / "x")
