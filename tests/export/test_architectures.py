"""Every architecture exports with the same code and computes what torch computes."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from gemini.compress.apply import run_recipe
from gemini.compress.recipe import Recipe, load_recipe
from gemini.compress.specs import QuantizeInt4, QuantizeInt8
from gemini.export.exporter import export_checkpoint
from gemini.export.graphs import encoder_graph, sample_inputs
from gemini.model.checkpoint import Pooling

# float32 sums in another order over two layers; logits are of the order of 10.
TOLERANCE = 1e-4


def _session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _decode(session, model: dict, rows: list[list[int]], steps: list[list[int]]) -> list[np.ndarray]:
    """Last logits of a right-padded prefill and of every step, with a shared buffer as the runtime has it."""
    batch, width = len(rows), max(map(len, rows))
    capacity = width + len(steps)
    cache = {
        f"past.{i}.{part}": np.zeros((batch, layer["kv_heads"], capacity, layer[f"{part}_dim"]), np.float32)
        for i, layer in enumerate(model["layers"])
        for part in ("key", "value")
    }
    ids = np.array([row + [0] * (width - len(row)) for row in rows], np.int64)
    lengths = np.array([len(row) for row in rows], np.int32)
    positions = (lengths - 1).astype(np.int64)[:, None]
    names = [output.name for output in session.get_outputs()]
    found = []
    for new in [None, *steps]:
        if new is not None:
            ids, lengths, positions = np.array(new)[:, None], lengths + 1, np.zeros((batch, 1), np.int64)
        feeds = {
            "input_ids": ids,
            "seqlens_k": lengths - 1,
            "total_sequence_length": np.array(lengths.max(), np.int32),
            "logit_positions": positions,
        }
        results = dict(zip(names, session.run(None, feeds | cache), strict=True))
        cache = {name: results[name.replace("past", "present")] for name in cache}
        found.append(results["logits"][:, 0])
    return found


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2", "qwen3", "mistral", "gpt2", "gemma3", "phi3", "mixtral", "qwen2_moe", "gpt_oss"],
)
def test_decoder_matches_torch_on_ragged_prefill_and_steps(name, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(name)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    assert exported.form.attention == "grouped", exported.refused
    rows = [[5, 9, 33, 7, 50, 61, 12, 90], [71, 8, 40], [99]]
    steps = [[3, 44, 15], [60, 2, 77], [18, 18, 18]]
    found = _decode(_session(tmp_path / "decoder.onnx"), exported.model, rows, steps)
    for index, logits in enumerate(found):
        for row, tokens in enumerate(rows):
            text = tokens + [step[row] for step in steps[:index]]
            with torch.no_grad():
                expected = checkpoint.model(torch.tensor([text])).logits[0, -1].numpy()
            np.testing.assert_allclose(logits[row], expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "modernbert"])
def test_encoder_matches_torch_on_padded_batch(name, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(name)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    assert exported.form.attention == "multi-head", exported.refused
    inputs = sample_inputs(checkpoint, batch=3, length=9)
    inputs["attention_mask"][1, 5:] = 0
    inputs["attention_mask"][2, 1:] = 0
    with torch.no_grad():
        expected = checkpoint.model(**inputs).logits.numpy()
    (logits,) = _session(tmp_path / "encoder.onnx").run(None, {k: v.numpy() for k, v in inputs.items()})
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken"])
def test_pooling_matches_a_slow_loop(mode, make_checkpoint):
    from transformers import BertModel

    checkpoint = make_checkpoint("bert", Pooling(mode, normalize=True, declared=True))
    base: BertModel = checkpoint.model.bert
    graph = encoder_graph(type(checkpoint)(**{**vars(checkpoint), "model": base}))
    inputs = sample_inputs(checkpoint, batch=3, length=6)
    kept = (6, 4, 1)
    for row, count in enumerate(kept):
        inputs["attention_mask"][row, count:] = 0
    with torch.no_grad():
        actual = graph.module(*inputs.values())
        hidden = base(**inputs).last_hidden_state
    for row, count in enumerate(kept):
        real = hidden[row, :count]
        vector = {"mean": real.mean(0), "cls": real[0], "max": real.amax(0), "lasttoken": real[-1]}[mode]
        torch.testing.assert_close(actual[row], vector / vector.norm(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit", "clip", "convnext", "swin"])
def test_image_classifier_matches_torch(name, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(name)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    assert exported.form.attention == ("model" if name == "swin" else "multi-head"), exported.refused
    inputs = sample_inputs(checkpoint, batch=3)
    with torch.no_grad():
        expected = checkpoint.model(**inputs).logits.numpy()
    (logits,) = _session(tmp_path / "vision.onnx").run(None, {"pixel_values": inputs["pixel_values"].numpy()})
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cohere", "olmo2", "gpt_neox", "bloom", "falcon", "deepseek_v3"])
def test_architecture_outside_the_list_exports_by_some_form(name, make_checkpoint, tmp_path):
    exported = export_checkpoint(make_checkpoint(name), tmp_path, progress=False)
    assert exported.verification["largest_difference"] < 1e-2
    assert exported.verification["greedy_tokens"] > 0


def test_int4_graph_packs_projections_and_ties_embedding(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("llama")
    model = checkpoint.model
    model.lm_head.weight = model.model.embed_tokens.weight
    spec = QuantizeInt4(block_size=32, embedding_block_size=32)
    run_recipe(checkpoint, Recipe("test", (spec,)), None, progress=False)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    assert exported.fusions["pack_qkv"] == 2
    assert exported.fusions["fuse_skip_norm"] == 4
    table = 101 * 64  # one byte a weight
    assert sum(size for size in exported.bytes.values()) < 2 * table + 4 * 64 * 96 * 4
    stored = [v for k, v in exported.bytes.items() if "lm_head" in k or "embed" in k]
    assert sum(1 for size in stored if size >= table) == 1


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize(("bits", "size"), [(8, 0), (4, 16)])
def test_split_tables_export(name, bits, size, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(name)
    if name == "llama":
        checkpoint.model.lm_head.weight = checkpoint.model.model.embed_tokens.weight
    wide = {"embedding_wide_share": 0.25, "embedding_wide_bits": bits, "embedding_wide_block_size": size}
    spec = QuantizeInt4(block_size=32, embedding_bits=4, embedding_block_size=32, **wide)
    run_recipe(checkpoint, Recipe("test", (spec,)), None, progress=False)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    assert not exported.refused and exported.verification["largest_difference"] < 1e-3
    if name == "llama":
        codes = 32 * 8 * bits + 69 * 32  # a quarter of 101 rows, to a multiple of 16, of 64 numbers
        stored = [size for key, size in exported.bytes.items() if "embed" in key or "lm_head" in key]
        assert codes < sum(stored) < 2 * codes  # once, although tied
    graph = onnx.load(
        tmp_path / f"{'decoder' if name == 'llama' else 'encoder'}.onnx", load_external_data=False
    )
    lookups = [node for node in graph.graph.node if node.op_type == "GatherBlockQuantized"]
    found = [{a.name: a.i for a in node.attribute} for node in lookups]
    assert {(each["bits"], each["block_size"]) for each in found} == {(bits, size or 32), (4, 32)}


def test_every_builtin_recipe_exports_with_float_arithmetic_equal_to_torch(make_checkpoint, tmp_path):
    for recipe in ("int8", "nf4"):
        checkpoint = make_checkpoint("llama")
        run_recipe(checkpoint, load_recipe(recipe), None, progress=False)
        folder = tmp_path / recipe
        folder.mkdir()
        exported = export_checkpoint(checkpoint, folder, progress=False)
        assert exported.verification["largest_difference"] < 1e-3


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    "spec",
    [
        QuantizeInt4(block_size=64, symmetric=False, embedding_block_size=32),  # finer blocks in the graph
        QuantizeInt4(block_size=32, sensitive_share=0.9, embedding_block_size=64),  # in 8 bits
        QuantizeInt8(),
    ],
    ids=["asymmetric", "sensitive", "8 bits"],
)
def test_quantized_experts_export_with_float_arithmetic_equal_to_torch(name, spec, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(name)
    windows = [np.random.default_rng(seed).integers(3, 101, (1, 16)) for seed in range(4)]
    (report,) = run_recipe(checkpoint, Recipe("test", (spec,)), windows, progress=False)
    experts = [layer for layer in report.layers if layer.kind == "experts"]
    assert len(experts) == 4
    if getattr(spec, "sensitive_share", 0):
        assert 8 in {layer.bits for layer in experts}
    assert all(first.bits == second.bits for first, second in zip(experts[::2], experts[1::2], strict=True))
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    assert not exported.refused and exported.verification["largest_difference"] < 1e-3
    graph = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "QMoE"]
    assert len(nodes) == 2 and not any(node.op_type == "MoE" for node in graph.node)
    assert all(any(a.name == "weights_prepacked" and a.i == 0 for a in node.attribute) for node in nodes)
    assert exported.fusions["fuse_router"] == exported.fusions["keep_sequences"] == 2
    ids = np.array([[5, 9, 33, 7, 50]])
    found = _decode(_session(tmp_path / "decoder.onnx"), exported.model, ids.tolist(), [])
    with torch.no_grad():
        expected = checkpoint.model(torch.tensor(ids)).logits[0, -1].numpy()
    # The kernels round activations to 8 bits.
    assert np.corrcoef(found[0][0], expected)[0, 1] > 0.99


def test_embedding_whose_width_is_no_multiple_of_the_block_exports(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("llama")
    # 64 columns in blocks of 128: half of every block is padding
    spec = QuantizeInt4(block_size=32, embedding_block_size=128)
    run_recipe(checkpoint, Recipe("test", (spec,)), None, progress=False)
    exported = export_checkpoint(checkpoint, tmp_path, progress=False)
    assert exported.form.attention == "grouped", exported.refused
    assert exported.verification["largest_difference"] < 1e-3


def test_two_exports_give_identical_files(make_checkpoint, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export_checkpoint(make_checkpoint("llama"), tmp_path / name, progress=False)
    for file in ("decoder.onnx", "decoder.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_export_leaves_the_torch_model_as_it_was(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("llama")
    ids = torch.arange(5)[None]
    before = checkpoint.model(ids).logits
    modules = [type(m) for m in checkpoint.model.modules()]
    export_checkpoint(checkpoint, tmp_path, progress=False)
    assert [type(m) for m in checkpoint.model.modules()] == modules
    assert torch.equal(checkpoint.model(ids).logits, before)
