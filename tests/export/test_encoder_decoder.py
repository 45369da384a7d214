"""Encoder-decoders through export and runtime: the same tokens as transformers, weights stored once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gemini.compress.apply import run_recipe
from gemini.compress.recipe import load_recipe
from gemini.errors import ExportError
from gemini.export.bundle import answer_facts, describe, write_companions, write_manifest
from gemini.export.exporter import export_checkpoint
from gemini.model.checkpoint import Checkpoint
from gemini.model.gemini import GeminiImageProcessor
from gemini.runtime import Seq2SeqGenerator, load

# float32 sums in another order over two layers; logits are of the order of 10.
TOLERANCE = 1e-4
SOURCES = ["w9 w33 w71 w8 w40 w99 w12", "w60 w61", "w5"]


def bundle(checkpoint: Checkpoint, folder: Path) -> Seq2SeqGenerator:
    """The checkpoint as a loaded bundle."""
    folder.mkdir(exist_ok=True)
    exported = export_checkpoint(checkpoint, folder, progress=False)
    write_companions(checkpoint, folder)
    write_manifest(folder, describe(checkpoint, exported))
    session = load(folder, threads=1)
    assert isinstance(session, Seq2SeqGenerator)
    return session


def generated(checkpoint: Checkpoint, text: str, count: int = 12) -> list[int]:
    """What transformers generates greedily, without the start token."""
    inputs = checkpoint.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    tokens = checkpoint.model.generate(**inputs, max_new_tokens=count, do_sample=False, num_beams=1)[0]
    return tokens[1:].tolist()


@pytest.fixture
def make_pair(
    make_checkpoint: Callable[..., Checkpoint], words: PreTrainedTokenizerFast
) -> Callable[[str], Checkpoint]:
    """name -> a tiny encoder-decoder with a tokenizer."""
    return lambda name: replace(make_checkpoint(name), tokenizer=words)


@pytest.mark.parametrize("name", ["bart", "marian", pytest.param("t5", marks=pytest.mark.slow)])
def test_runtime_generates_the_tokens_of_transformers(name, make_pair, tmp_path):
    checkpoint = make_pair(name)
    session = bundle(checkpoint, tmp_path / "bundle")
    together = session.generate(SOURCES, max_new_tokens=12)
    for text, answer in zip(SOURCES, together, strict=True):
        expected = generated(checkpoint, text)
        assert list(answer.tokens) == expected[: len(answer.tokens)]
        assert len(answer.tokens) == len(expected) or answer.finish_reason == "eos"
        alone = session.generate(text, max_new_tokens=12)
        assert alone == answer and "".join(session.stream(text, max_new_tokens=12)) == answer.text
    targets = np.array([[7, 45, 61, 90]])
    source = checkpoint.tokenizer(SOURCES[0])["input_ids"]
    logits = session.logits([source], targets)
    start = torch.tensor([[checkpoint.model.config.decoder_start_token_id, *targets[0]]])
    with torch.no_grad():
        expected = checkpoint.model(input_ids=torch.tensor([source]), decoder_input_ids=start).logits
    np.testing.assert_allclose(logits, expected.numpy(), atol=TOLERANCE, rtol=TOLERANCE)


def test_labels_of_a_classification_are_tokens(make_pair):
    checkpoint = make_pair("bart")
    config, known = checkpoint.model.config, checkpoint.tokenizer.get_vocab()
    token = next(iter(known))
    task = {"prefix": "say: ", "labels": {"good": token}, "longest": 9}
    config.task_specific_params = {"text-classification": task}
    facts = answer_facts(checkpoint)
    assert facts["label_ids"] == {"good": known[token]} and facts["longest_classified"] == 9
    for wrong, match in (
        ({"labels": {"good": "no such token"}}, "no tokens of the vocabulary"),
        ({"labels": [token]}, "no tokens of the vocabulary"),
        ({"labels": {"good": [token]}}, "no tokens of the vocabulary"),
        ({"longest": 0}, "reads 0 tokens"),
        ({"longest": "9"}, "reads '9' tokens"),
    ):
        config.task_specific_params = {"text-classification": {**task, **wrong}}
        with pytest.raises(ExportError, match=match):
            answer_facts(checkpoint)


@pytest.mark.parametrize(
    ("recipe", "table"),
    [
        ("int8", 101 * 64),  # one byte a weight
        ("int4", 16 * 64 + 85 * 32),  # of the first eighth, up to a multiple of 16, one; of the others half
    ],
)
def test_quantized_pair_stores_its_shared_table_once(recipe, table, make_pair, tmp_path):
    checkpoint = make_pair("bart")
    (report,) = run_recipe(checkpoint, load_recipe(recipe), None, progress=False)
    assert {layer.kind for layer in report.layers} == {"linear", "embedding", "tied head"}
    session = bundle(checkpoint, tmp_path / "bundle")
    raw = session.bundle.manifest.raw
    assert raw["verification"]["largest_difference"] < 1e-3
    assert raw["form"].startswith("grouped"), raw["refused_forms"]
    stored = {
        name: size for name, size in raw["bytes"].items() if "embed_tokens" in name or name == "lm_head"
    }
    assert table <= sum(stored.values()) < 2 * table
    # 8-bit activations round, so tokens may differ; torch must rank what was chosen close to its best.
    answer = session.generate(SOURCES[0], max_new_tokens=8)
    source = checkpoint.tokenizer(SOURCES[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        tokens = torch.tensor([[1, *answer.tokens]])
        logits = checkpoint.model(input_ids=source, decoder_input_ids=tokens).logits[0, :-1]
    chosen = logits.gather(1, tokens[0, 1:, None])[:, 0]
    assert (logits.amax(-1) - chosen < 0.1 * logits.std()).all()


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("gemini-early", "int8"),
        ("gemini-prototypes", "fp32"),
        pytest.param("gemini-prototypes", "int4", marks=pytest.mark.slow),
        pytest.param("gemini-late", "fp32", marks=pytest.mark.slow),
        pytest.param("gemini-hybrid", "int4", marks=pytest.mark.slow),
    ],
)
def test_images_beside_text_reach_the_decoder(name, recipe, make_pair, tmp_path):
    processor = GeminiImageProcessor(size={"height": 16, "width": 16})
    checkpoint = replace(make_pair(name), processor=processor)
    if recipe != "fp32":
        (report,) = run_recipe(checkpoint, load_recipe(recipe), None, progress=False)
        assert len(report.folded) == 9 and "convolution" in {layer.kind for layer in report.layers}
    session = bundle(checkpoint, tmp_path / "bundle")
    manifest = session.bundle.manifest
    assert manifest.raw["form"].startswith("grouped"), manifest.raw["refused_forms"]
    assert set(manifest.graphs) == {"vision", "encoder", "decoder"}
    assert session.model.image.vectors == (1 if name == "gemini-prototypes" else 4)
    cases = {case["name"]: case["difference"] for case in manifest.raw["verification"]["cases"]}
    assert "prefill, padded sources with images" in cases and "prefill, one source" in cases
    assert max(cases.values()) < 1e-3
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    pixels = checkpoint.processor(images=picture, return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(session.preprocess([picture]), pixels.numpy(), atol=TOLERANCE)
    if recipe != "fp32":
        return  # activations of 8 bits: the float comparison above is the exact one
    for text in SOURCES[:2]:
        answer = session.generate(text, picture, max_new_tokens=8)
        inputs = checkpoint.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        expected = checkpoint.model.generate(
            **inputs, pixel_values=pixels, max_new_tokens=8, do_sample=False, num_beams=1
        )
        assert list(answer.tokens) == expected[0, 1:].tolist()
        # Of one vector among a text's, random weights make too little to change a token.
        assert name == "gemini-prototypes" or answer.tokens != session.generate(text, max_new_tokens=8).tokens


@pytest.mark.slow
def test_encoder_that_reads_pixels_alone(make_pair, tmp_path):
    processor = GeminiImageProcessor(size={"height": 16, "width": 16})
    checkpoint = replace(make_pair("vit-gpt2"), task="image-to-text", processor=processor)
    session = bundle(checkpoint, tmp_path / "bundle")
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    pixels = torch.from_numpy(session.preprocess([picture]))
    expected = checkpoint.model.generate(pixel_values=pixels, max_new_tokens=8, do_sample=False, num_beams=1)
    assert list(session.generate(image=picture, max_new_tokens=8).tokens) == expected[0, 1:].tolist()
