"""Timing of real bundles: tiny graphs written here with onnx alone, sealed like any other bundle."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gemini.benchmarks.bench import main, measure_apart, run_bench
from gemini.errors import BundleError, UsageError
from gemini.runtime.manifest import seal

VOCAB, DIM = 40, 4


def write_bundle(folder, family, task, nodes, inputs, outputs, model):
    """A bundle of one graph; table (VOCAB, VOCAB) is its only weight."""
    table = np.random.default_rng(0).standard_normal((VOCAB, VOCAB)).astype(np.float32)
    graph = helper.make_graph(nodes, family, inputs, outputs, [numpy_helper.from_array(table, "table")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(proto)
    folder.mkdir()
    (folder / f"{family}.onnx").write_bytes(proto.SerializeToString())
    (folder / "tokenizer.json").write_text("{}")
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
        for path in folder.iterdir()
    }
    manifest = {
        "schema_version": 1,
        "name": folder.name,
        "task": task,
        "family": family,
        "graphs": {family: f"{family}.onnx"},
        "files": files,
        "model": model,
        "requirements": {"onnxruntime": "1.20"},
    }
    (folder / "manifest.json").write_bytes(seal(manifest))
    return folder


def info(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def decoder_bundle(folder):
    """A bigram model with a one-layer cache that nothing reads."""
    nodes = [
        helper.make_node("GatherElements", ["input_ids", "logit_positions"], ["picked"], axis=1),
        helper.make_node("Gather", ["table", "picked"], ["logits"]),
        helper.make_node("Unsqueeze", ["input_ids", "axes"], ["ids4"]),
        helper.make_node("Cast", ["ids4"], ["new"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["past.0.key", "new"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past.0.value", "new"], ["present.0.value"], axis=2),
    ]
    nodes.insert(0, helper.make_node("Constant", [], ["axes"], value_ints=[1, 3]))
    cache = ["batch", 1, "past", 1]
    inputs = [
        info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        info("logit_positions", TensorProto.INT64, ["batch", "positions"]),
        info("past.0.key", TensorProto.FLOAT, cache),
        info("past.0.value", TensorProto.FLOAT, cache),
    ]
    total = ["batch", 1, "total", 1]
    outputs = [
        info("logits", TensorProto.FLOAT, ["batch", "positions", VOCAB]),
        info("present.0.key", TensorProto.FLOAT, total),
        info("present.0.value", TensorProto.FLOAT, total),
    ]
    layers = [{"kv_heads": 1, "key_dim": 1, "value_dim": 1}]
    model = {"vocab_size": VOCAB, "context_length": 64, "layers": layers, "cache": "concat"}
    return write_bundle(folder, "decoder", "text-generation", nodes, inputs, outputs, model)


def encoder_bundle(folder):
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["axis"], value_ints=[2]),
        helper.make_node("Unsqueeze", ["mask", "axis"], ["mask3"]),
        helper.make_node("Mul", ["rows", "mask3"], ["kept"]),
        helper.make_node("ReduceMean", ["kept"], ["embedding"], axes=[1], keepdims=0),
    ]
    names = ["input_ids", "attention_mask"]
    inputs = [info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names]
    outputs = [info("embedding", TensorProto.FLOAT, ["batch", VOCAB])]
    model = {"vocab_size": VOCAB, "context_length": 32, "inputs": names, "embedding_dim": VOCAB}
    return write_bundle(folder, "encoder", "feature-extraction", nodes, inputs, outputs, model)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "a": decoder_bundle(folder / "a"),
        "b": decoder_bundle(folder / "b"),
        "encoder": encoder_bundle(folder / "encoder"),
    }


def test_generators_are_compared_in_one_run(bundles):
    result = run_bench([bundles["a"], bundles["b"]], 8, 4, threads=1, repeat=3)
    assert [entry["name"] for entry in result["bundles"]] == ["a", "b"]
    first, second = (entry["latency"] for entry in result["bundles"])
    assert (first["repeat"], first["new_tokens"], first["token_ms"]["n"]) == (3, 4, 12)
    assert first["bytes_per_token"] > VOCAB * VOCAB * 4  # the graph file, which holds the table
    assert result["bundles"][0]["ratio"] == {"prefill": 1.0, "decode": 1.0}
    ratio = second["decode_tokens_per_second"] / first["decode_tokens_per_second"]
    assert result["bundles"][1]["ratio"]["decode"] == pytest.approx(ratio)
    assert result["host"]["threads"] == 1 and result["host"]["provider"] == "cpu"
    assert result["bundles"][0]["size_mb"] > 0.006


def test_bundles_take_turns(bundles, monkeypatch):
    from gemini.benchmarks import bench

    order = []
    real = bench.open_contestant

    def spy(bundle, *arguments):
        one = real(bundle, *arguments)
        timed = one.generate
        object.__setattr__(one, "generate", lambda: (order.append(bundle.manifest.name), timed())[1])
        return one

    monkeypatch.setattr(bench, "open_contestant", spy)
    run_bench([bundles["a"], bundles["b"]], 4, 2, threads=1, repeat=2)
    assert order == ["a", "b"] * 3  # one round to warm up, two measured


def test_encoder_is_timed_at_the_length_asked_for(bundles):
    result = run_bench([bundles["encoder"]], 16, 1, threads=1, repeat=2)
    (point,) = result["bundles"][0]["latency"]["points"]
    assert (point["batch"], point["tokens"]) == (1, 16)
    assert result["new_tokens"] is None
    assert result["bundles"][0]["ratio"] == {"speed": 1.0}


@pytest.mark.parametrize(
    ("names", "options", "cause"),
    [
        (["a", "encoder"], {}, "different tasks"),
        ([], {}, "no bundle"),
        (["a"], {"new_tokens": 0}, "number of new tokens"),
        (["a"], {"repeat": 0}, "number of repeats"),
        (["a"], {"prompt_tokens": 63, "new_tokens": 2}, "exceed the context"),
        (["encoder"], {"prompt_tokens": 33}, "exceed the context"),
        (["a"], {"prompt_tokens": 4, "new_tokens": 1, "threads": 0}, "thread count"),
    ],
)
def test_unusable_requests_are_refused(bundles, names, options, cause):
    with pytest.raises(UsageError, match=cause):
        run_bench([bundles[name] for name in names], **options)


def test_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError):
        run_bench([tmp_path / "absent"])


def test_last_line_is_json(bundles, capsys):
    assert main([str(bundles["a"]), "--prompt-tokens=4", "--new-tokens=2", "--repeat=1", "--threads=1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["schema_version"] == 1 and result["task"] == "text-generation"
    assert main([str(bundles["a"]), "--repeat=0"]) == 2
    assert "number of repeats" in capsys.readouterr().err


def test_measuring_apart_gives_the_childs_figures_or_its_message(bundles, tmp_path):
    latency = measure_apart(bundles["a"], 4, 2, threads=1, repeat=1)
    assert latency["kind"] == "generator" and latency["token_ms"]["n"] == 2
    assert latency["peak_rss_mb"] < 400  # a process without torch
    with pytest.raises(UsageError, match="could not be timed"):
        measure_apart(tmp_path / "absent")


def test_benchmarks_import_no_torch():
    code = "import sys, gemini.benchmarks.bench, gemini.benchmarks.report, gemini.benchmarks.accuracy\n"
    code += (
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
