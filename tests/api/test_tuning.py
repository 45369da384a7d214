"""Blocks chosen by measurement: which are considered, what decides, and what is recorded."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from gemini import tuning
from gemini.cli import main
from gemini.cli.output import tuning_line
from gemini.compress.layers import Integers
from gemini.compress.recipe import load_recipe
from gemini.compress.specs import PerBlock
from gemini.errors import RecipeError, UsageError
from gemini.model.checkpoint import Checkpoint
from gemini.pipeline import compress_model
from gemini.tuning import product_seconds, tune_recipe


def checkpoint(model: torch.nn.Module, family: str = "decoder") -> Checkpoint:
    model.eval().requires_grad_(False)
    return Checkpoint("tiny", "text-generation", family, model, None, None, None, 64, {})


@pytest.fixture(scope="module")
def llama() -> Checkpoint:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return checkpoint(LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, **sizes)))


def clock(fastest: Integers, gain: float = 0.5):
    """A clock by which one kind of blocks takes so much less than all others."""
    calls = []

    def measure(shapes, formats):
        calls.append((dict(shapes), list(formats)))
        return [1e-3 * (1 - gain if each == fastest else 1) for each in formats]

    measure.calls = calls
    return measure


def test_the_fastest_blocks_are_taken_and_the_portable_ones_recorded(llama):
    recipe = load_recipe("int4")
    tuned = tune_recipe(llama, recipe, clock=clock(Integers(4, 32, False, "moments")))
    (before,), (after,) = recipe.specs, tuned.recipe.specs
    assert (before.block_size, before.symmetric, after.block_size, after.symmetric) == (32, True, 32, False)
    assert after.fit == before.fit
    assert after.embedding_block_size == before.embedding_block_size
    assert tuned.recipe.name == "int4, tuned"
    facts = json.loads(json.dumps(tuned.to_dict()))
    assert facts["portable"]["name"] == "4-bit blocks of 32"
    assert facts["chosen"]["name"] == "4-bit blocks of 32 with zero points"
    line = tuning_line(facts)
    assert line.startswith("4-bit blocks of 32 with zero points, 0.50 ms")
    assert line.endswith("instead of 4-bit blocks of 32, 1.00 ms")


def test_every_product_of_a_token_is_timed(llama):
    measure = clock(Integers(4, 32, True, "moments"))
    tune_recipe(llama, load_recipe("int4"), clock=measure)
    # Of each of two layers: query and output, key and value, gate and up, down.
    assert measure.calls[0][0] == {(128, 128): 4, (128, 64): 4, (128, 256): 4, (256, 128): 2}


def test_less_than_noise_changes_nothing(llama):
    recipe = load_recipe("int4")
    tuned = tune_recipe(
        llama, recipe, clock=clock(Integers(4, 32, False, "moments"), gain=tuning.MIN_GAIN / 2)
    )
    assert tuned.recipe is recipe
    assert "stay" in tuning_line(tuned.to_dict())


def test_blocks_that_cost_accuracy_are_not_considered(llama):
    """Squared errors of normal weights, as a loop over blocks finds them without our quantizer."""
    weight = llama.model.model.layers[0].mlp.down_proj.weight.numpy()

    def error(size: int, symmetric: bool) -> float:
        total = 0.0
        for block in weight.reshape(-1, size):
            if symmetric:
                scale = block[np.abs(block).argmax()] / -8
                codes = np.clip(np.round(block / scale), -8, 7)
            else:
                low, high = min(block.min(), 0), max(block.max(), 0)
                scale = (high - low) / 15
                zero = np.clip(np.round(-low / scale), 0, 15)
                codes = np.clip(np.round(block / scale), -zero, 15 - zero)
            total += float(np.square(codes * scale - block).sum())
        return total

    recipe = load_recipe("int4")
    nearest = type(recipe)("nearest", (type(recipe.specs[0])(block_size=32, symmetric=True, fit="nearest"),))
    tuned = tune_recipe(llama, nearest, clock=clock(Integers(4, 128, False)))
    considered = {(each.blocks.block_size, each.blocks.symmetric): each.error for each in tuned.candidates}
    assert (128, False) not in considered
    assert (128, True) not in considered
    assert {(32, True), (32, False), (16, True), (16, False)} <= set(considered)
    own = error(32, True)
    for (size, symmetric), found in considered.items():
        # All layers are drawn alike; one of them speaks for a dozen within some percent.
        assert found == pytest.approx(error(size, symmetric) / own, rel=0.06)
        assert found <= tuning.ERROR_LIMIT


def test_int8_blocks_of_a_generator(llama):
    tuned = tune_recipe(llama, load_recipe("int8"), clock=clock(Integers(8, 32, True)))
    assert tuned.portable == Integers(8, 64, True)
    assert tuned.recipe.specs[0].granularity == PerBlock(32)
    assert all(each.blocks.bits == 8 and each.blocks.symmetric for each in tuned.candidates)


def test_real_kernels_are_timed():
    spent = product_seconds(
        {(64, 32): 3}, [Integers(4, 32, True), Integers(4, 64, False), Integers(8, 32, True)]
    )
    assert len(spent) == 3
    assert all(0 < each < 1 for each in spent)


@pytest.mark.parametrize("name", ["fp32", "nf4"])
def test_recipes_without_blocks_of_integers_are_refused(llama, name):
    with pytest.raises(RecipeError, match="no blocks of weights"):
        tune_recipe(llama, load_recipe(name))


def test_an_encoder_per_channel_has_none_either():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(RecipeError, match="leave --tune out"):
        tune_recipe(checkpoint(BertModel(BertConfig(**sizes)), "encoder"), load_recipe("int8"))


def test_the_bundle_says_what_was_measured(gemini_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        tuning,
        "product_seconds",
        lambda shapes, formats, progress: [
            0.5 if each.symmetric is False and each.block_size == 32 else 1.0 for each in formats
        ],
    )
    report = compress_model(str(gemini_folder), tmp_path / "out", "int4", tune=True, progress=False)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["tuning"] == report["tuning"]
    assert manifest["recipe"]["pass"][0]["symmetric"] is False
    assert report["tuning"]["portable"]["symmetric"] is True
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Blocks by measurement" in page
    assert "4-bit blocks of 32 with zero points" in page


def test_planned_formats_are_not_tuned(gemini_folder, tmp_path):
    with pytest.raises(UsageError, match="blocks of their own"):
        compress_model(str(gemini_folder), tmp_path / "out", target_bpw=5.0, tune=True, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_search_is_not_tuned(gemini_folder, tmp_path, capsys):
    arguments = [
        "compress",
        str(gemini_folder),
        "--output",
        str(tmp_path / "out"),
        "--search",
        "--max-drop",
        "5",
    ]
    assert main([*arguments, "--tune"]) == 2
    assert "compress the winner with it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_that_would_not_fill_a_block_are_not_padded():
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    narrow = checkpoint(LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes)))
    tuned = tune_recipe(narrow, load_recipe("int8"), clock=clock(Integers(8, 128, True)))
    assert {each.blocks.block_size for each in tuned.candidates} <= {16, 32, 64}  # 64 is the recipe's own
