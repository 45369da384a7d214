"""A decoder with an 8-bit cache: in onnxruntime what a loop with rounded keys and values gives in torch."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from transformers import DynamicCache

from gemini.compress.apply import run_recipe
from gemini.compress.cache import scales_of
from gemini.compress.recipe import Recipe
from gemini.compress.specs import QuantizeCache, QuantizeInt4, QuantizeInt8
from gemini.errors import ExportError, RecipeError
from gemini.export import exporter
from gemini.export.bundle import describe, write_companions, write_manifest
from gemini.export.cache_bits import quantize_past
from gemini.export.exporter import export_checkpoint
from gemini.runtime import GenerationOptions, load

WINDOWS = [np.random.default_rng(seed).integers(3, 100, (1, 40)) for seed in range(4)]
PROMPT = [5, 9, 40, 7, 8, 25, 12, 90, 31, 64, 6, 77]


class CodedCache(DynamicCache):
    """Stores codes, number by number as the operator's text says, and hands out what they stand for."""

    def __init__(self, scales):
        super().__init__()
        self.scales = [[one.double().numpy() for one in pair] for pair in scales]

    def update(self, keys, values, layer, *args, **kwargs):
        coded = []
        for x, scales in zip((keys, values), self.scales[layer], strict=True):
            found = x.double().numpy().copy()
            for head, channel in np.ndindex(scales.shape):
                step = scales[head, channel]
                found[:, head, :, channel] = (
                    np.clip(np.rint(found[:, head, :, channel] / step), -128, 127) * step
                )
            coded.append(torch.from_numpy(found).to(x.dtype))
        return super().update(*coded, layer, *args, **kwargs)


@pytest.fixture(scope="module")
def make(make_checkpoint, words):
    return lambda name: replace(make_checkpoint(name), tokenizer=words)


def make_bundle(checkpoint, folder, *specs):
    passes = run_recipe(checkpoint, Recipe("test", specs), WINDOWS, progress=False)
    folder.mkdir()
    exported = export_checkpoint(checkpoint, folder, progress=False)
    write_companions(checkpoint, folder)
    manifest = describe(checkpoint, exported) | {"recipe": {}, "passes": [one.type for one in passes]}
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def llama(make, tmp_path_factory):
    """(checkpoint with scales in its model, bundle)."""
    checkpoint = make("llama")
    return checkpoint, make_bundle(checkpoint, tmp_path_factory.mktemp("cache") / "bundle", QuantizeCache())


def reference(checkpoint, ids):
    """Logits (S, V) of torch with a coded cache, a token at a time."""
    cache, rows = CodedCache(scales_of(checkpoint.model).pairs()), []
    with torch.no_grad():
        for place, token in enumerate(ids):
            at = {"past_key_values": cache, "position_ids": torch.tensor([[place]])}
            rows.append(checkpoint.model(input_ids=torch.tensor([[token]]), **at).logits[0, 0].numpy())
    return np.stack(rows)


def test_logits_of_prefill_chunks_steps_and_drafts_are_the_reference(llama):
    checkpoint, folder = llama
    session = load(folder, threads=1)
    text = [*PROMPT, 33, 34, 35, 36]
    expected = reference(checkpoint, text)
    np.testing.assert_allclose(session.logits([text])[0], expected, atol=2e-4)
    batch = session.decoder()
    np.testing.assert_allclose(batch.prefill([PROMPT])[0], expected[11], atol=2e-4)
    np.testing.assert_allclose(
        batch.extend([33, 90]), reference(checkpoint, [*PROMPT, 33, 90])[-2:], atol=2e-4
    )
    batch.rewind(1)
    np.testing.assert_allclose(batch.step([34])[0], expected[13], atol=2e-4)
    assert (
        batch.memory()["kv_cache"] == 2 * 2 * 2 * 64 * 16
    )  # layers, keys and values, heads, capacity, bytes


def test_a_cache_that_grows_and_a_ragged_batch_keep_their_tokens(llama):
    _, folder = llama
    session = load(folder, threads=1)
    options = GenerationOptions(max_new_tokens=70, ignore_eos=True)
    (alone,) = session.generate_ids([PROMPT], options)
    assert session.generate_ids([PROMPT, PROMPT[:5]], options)[0] == alone
    batch = session.decoder()  # not told how much is to come: it grows at 64
    tokens = [int(batch.prefill([PROMPT])[0].argmax())]
    while len(tokens) < 70:
        tokens.append(int(batch.step([tokens[-1]])[0].argmax()))
    assert tokens == alone


def test_prefixes_are_kept_in_codes(llama, tmp_path):
    _, folder = llama
    session, other = load(folder, threads=1), load(folder, threads=1)
    options = GenerationOptions(max_new_tokens=5, ignore_eos=True)
    session.keep_prefixes(2**20)
    expected = session.generate_ids([PROMPT], options)
    assert session.memory()["prefixes"] == 16 * (8 + 2 * 2 * 2 * 16)  # tokens of 8 bytes and codes of one
    session.save_prefixes(tmp_path / "kept")
    other.keep_prefixes(2**20)
    other.restore_prefixes(tmp_path / "kept")
    assert other.generate_ids([PROMPT], options) == expected


def test_the_graph_says_int8_and_the_weights_may_be_quantized_too(make, tmp_path):
    folder = make_bundle(make("qwen3"), tmp_path / "b", QuantizeInt4(block_size=32), QuantizeCache())
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert {types[name] for name in types if "past" in name or "present" in name} == {onnx.TensorProto.INT8}
    cases = json.loads((folder / "manifest.json").read_text())["verification"]["cases"]
    assert sum("8-bit cache" in case["name"] for case in cases) == 4 and len(cases) > 8
    assert len(load(folder, threads=1).generate_ids([PROMPT])[0]) > 0


def test_scales_that_are_wrong_are_found(make_checkpoint, tmp_path, monkeypatch):
    checkpoint = make_checkpoint("llama")
    run_recipe(checkpoint, Recipe("test", (QuantizeCache(),)), WINDOWS, progress=False)
    monkeypatch.setattr(exporter, "LADDERS", {"decoder": exporter.LADDERS["decoder"][:1]})
    monkeypatch.setattr(
        exporter, "quantize_past", lambda model, pairs: quantize_past(model, [(v, k) for k, v in pairs])
    )
    with pytest.raises(ExportError, match="8-bit cache"):
        export_checkpoint(checkpoint, tmp_path, progress=False)


def test_other_families_and_other_attention_are_refused(make_checkpoint, tmp_path):
    with pytest.raises(RecipeError, match="text generators"):
        run_recipe(
            make_checkpoint("bert"), Recipe("t", (QuantizeInt8(), QuantizeCache())), WINDOWS, progress=False
        )
    checkpoint = make_checkpoint("bloom")  # its attention adds a bias, which no operator takes
    run_recipe(checkpoint, Recipe("t", (QuantizeCache(),)), WINDOWS, progress=False)
    with pytest.raises(ExportError, match="no GroupQueryAttention"):
        export_checkpoint(checkpoint, tmp_path, progress=False)
