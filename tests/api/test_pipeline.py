"""The whole way on a tiny model: bundle, report, gate, bad targets, interruption, determinism."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gemini import cli, pipeline
from gemini.benchmarks.text import default_text
from gemini.errors import BundleError, GateError
from gemini.model import disk
from gemini.runtime import load
from gemini.runtime.options import GenerationOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random Llama with a tokenizer trained on the built-in text."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([default_text().calibration[:20000]], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=400,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory) -> tuple[Path, dict]:
    """An int4 bundle of it, and the report."""
    path = tmp_path_factory.mktemp("out") / "bundle"
    return path, pipeline.compress_model(str(folder), path, "int4", progress=False)


def test_bundle_carries_its_evidence(bundle):
    path, report = bundle
    assert [row["name"] for row in report["table"]] == ["fp32", "round-to-nearest", "bundle"]
    assert report["metric"] == "perplexity" and report["gate"] == "not set"
    assert {"report.json", "report.html", "tokenizer.json", "decoder.onnx", "decoder.onnx.data"} <= {
        f.name for f in path.iterdir()
    }
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["verification"]["largest_difference"] < 1e-3
    assert manifest["recipe"]["name"] == "int4"
    assert manifest["metrics"]["table"][2]["perplexity"] == report["table"][2]["perplexity"]
    assert manifest["fusions"]["pack_qkv"] == 2
    sizes = {f.name: f.stat().st_size for f in path.iterdir() if f.name != "manifest.json"}
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == sizes


def test_graphs_for_a_gpu_change_nothing_on_the_cpu(folder, bundle, tmp_path, capsys):
    path = tmp_path / "gpu"
    assert cli.main(["compress", str(folder), "--recipe", "int4", "--gpu", "--output", str(path)]) == 0
    for name in ("decoder.onnx", "decoder.onnx.data"):
        assert (path / name).read_bytes() == (bundle[0] / name).read_bytes()
    capsys.readouterr()
    assert cli.main(["inspect", str(path)]) == 0
    assert "decoder.onnx" in (shown := capsys.readouterr().out) and "decoder.half.onnx" in shown
    data = bytearray((path / "decoder.half.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "decoder.half.onnx").write_bytes(data)
    assert cli.main(["verify", str(path)]) == 2
    assert "decoder.half.onnx does not match its sha256" in capsys.readouterr().err


def test_fp32_bundle_generates_what_transformers_generates(folder, tmp_path):
    pipeline.compress_model(str(folder), tmp_path / "b", "fp32", progress=False)
    session = load(tmp_path / "b")
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    for prompt in ([5, 9, 30], [200, 17, 88, 3, 41, 6]):
        ours = session.generate_ids([prompt], GenerationOptions(max_new_tokens=32))[0]
        with torch.no_grad():
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, pad_token_id=1)
        assert list(ours) == ids[0, len(prompt) :].tolist()


def test_session_logits_equal_torch_on_unequal_rows(folder, tmp_path):
    pipeline.compress_model(str(folder), tmp_path / "b", "fp32", progress=False)
    session = load(tmp_path / "b")
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    rows = [[5, 9, 30, 7, 99], [200, 17], [4, 4, 4]]
    ids = np.array([row + [0] * (5 - len(row)) for row in rows])
    logits = session.logits(ids, lengths=[len(row) for row in rows])
    for row, text in enumerate(rows):
        with torch.no_grad():
            expected = model(torch.tensor([text])).logits[0].numpy()
        # float32 in another order of sums, two layers
        np.testing.assert_allclose(logits[row, : len(text)], expected, atol=1e-4)


def test_same_recipe_twice_gives_the_same_graph_and_weights(folder, bundle, tmp_path):
    path, _ = bundle
    pipeline.compress_model(str(folder), tmp_path / "b", "int4", progress=False)
    for name in ("decoder.onnx", "decoder.onnx.data", "tokenizer.json"):
        assert (path / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.fixture(scope="module")
def half(folder, tmp_path_factory) -> Path:
    """The same model in bfloat16, as most checkpoints are published."""
    path = tmp_path_factory.mktemp("half") / "model"
    LlamaForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(path)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(path)
    return path


@pytest.mark.parametrize("recipe", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_weights_in_files_give_the_same_bundle(half, monkeypatch, tmp_path, recipe):
    monkeypatch.setattr(disk, "_SMALLEST", 1)
    made = []
    monkeypatch.setattr(disk, "_forget", lambda path: made.append(path) or path.unlink())
    for name, memory in (("plain", None), ("spared", disk.WORKING / 1e9)):
        report = pipeline.compress_model(str(half), tmp_path / name, recipe, memory=memory, progress=False)
        assert report["memory"]["weights_on_disk"] is (memory is not None)
        assert bool(made) is (memory is not None)
    assert len(made) > len(list(LlamaForCausalLM.from_pretrained(half).parameters()))  # dense copies as well
    for name in ("decoder.onnx", "decoder.onnx.data"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "spared" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain", "spared"]


def test_a_disk_too_small_for_the_weights(half, monkeypatch, tmp_path, capsys):
    def full(_source, _target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "_write_float32", full)
    assert cli.main(["compress", str(half), "--output", str(tmp_path / "b"), "--memory", "1.5"]) == 2
    assert "is full" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_limit_that_no_model_fits_into(half, tmp_path, capsys):
    assert cli.main(["compress", str(half), "--output", str(tmp_path / "b"), "--memory", "0.5"]) == 2
    assert "too little memory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_gate_sets_a_bad_bundle_aside_and_keeps_the_old_one(folder, monkeypatch, tmp_path):
    out = tmp_path / "b"
    out.mkdir()
    (out / "manifest.json").write_text("an older bundle")
    monkeypatch.setattr(pipeline, "loss_percent", lambda *_: 12.0)
    with pytest.raises(GateError, match=r"perplexity lost 12\.0 %.*model\.layers\.\d"):
        pipeline.compress_model(str(folder), out, "nf4", max_drop=5.0, force=True, progress=False)
    assert (out / "manifest.json").read_text() == "an older bundle"
    report = json.loads((tmp_path / "b.rejected" / "report.json").read_text())
    assert report["gate"] == "failed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "b.rejected"]


def test_generous_gate_passes(folder, tmp_path):
    report = pipeline.compress_model(str(folder), tmp_path / "b", "int8", max_drop=50.0, progress=False)
    assert report["gate"] == "passed"


def test_existing_output_is_refused_before_any_work(folder, bundle, monkeypatch):
    monkeypatch.setattr(pipeline, "load_checkpoint", lambda *_: pytest.fail("work was done"))
    with pytest.raises(BundleError, match="--force"):
        pipeline.compress_model(str(folder), bundle[0], "int4", progress=False)


@pytest.mark.parametrize(
    ("stage", "error", "code"),
    [
        ("write_companions", KeyboardInterrupt(), 130),
        ("write_report", OSError(errno.ENOSPC, "No space left on device"), 2),
        ("export_checkpoint", KeyboardInterrupt(), 130),
    ],
)
def test_interruption_leaves_nothing_and_keeps_the_old_bundle(
    folder, tmp_path, monkeypatch, stage, error, code
):
    out = tmp_path / "b"
    out.mkdir()
    (out / "manifest.json").write_text("an older bundle")

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(pipeline, stage, fail)
    arguments = ["compress", str(folder), "--recipe", "fp32", "--output", str(out), "--force"]
    assert cli.main(arguments) == code
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert (out / "manifest.json").read_text() == "an older bundle"


def test_runtime_verbs_on_a_real_bundle_load_no_torch(bundle):
    path, _ = bundle
    program = (
        "import sys; from gemini.cli import main\n"
        f"code = main(['run', {str(path)!r}, '--prompt', 'The', '--max-new-tokens', '8', '--json'])\n"
        "bad = {'torch', 'transformers', 'onnx', 'optimum'} & set(sys.modules)\n"
        "assert not code and not bad, (code, bad)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.strip().splitlines()[-1])
