"""Cut models against the same models with columns ignored, on several architectures, and as files."""

import copy

import numpy as np
import pytest
import torch
from pruning_models import (
    IDS,
    bart,
    bert,
    gemini,
    gemma,
    gpt2,
    gpt_neox,
    gpt_oss,
    llama,
    phi,
    t5,
    vit,
    windows_for,
)
from torch import nn

from gemini.compress.eliminate import eliminate
from gemini.compress.prune import kept_units, prune_units
from gemini.compress.sensitivity import output_fisher
from gemini.compress.structure import Structure, find_couplings
from gemini.errors import CheckpointError, RecipeError


def prune(model, **options):
    return prune_units(model, windows_for(model), progress=False, **{"multiple": 16, **options})


def logits(model: nn.Module, window) -> torch.Tensor:
    feed = window if isinstance(window, dict) else {"input_ids": window}
    with torch.no_grad():
        return model(**{key: torch.as_tensor(value) for key, value in feed.items()}).logits


def ignoring(model, report, window) -> torch.Tensor:
    """Logits of a model whose consumers get zeros from the units that the report says were cut."""
    kept = {cut.consumer: cut.kept for cut in report.cuts}
    handles = []
    for coupling in find_couplings(model, window, progress=False).couplings:
        if coupling.consumer in kept:
            gone = [unit for unit in range(coupling.units) if unit not in kept[coupling.consumer]]
            columns = coupling.columns[gone].flatten()
            handles.append(
                model.get_submodule(coupling.consumer).register_forward_pre_hook(
                    lambda _, args, columns=columns: (args[0].index_fill(-1, columns, 0.0),)
                )
            )
    assert len(handles) == len(kept)
    made = logits(model, window)
    for handle in handles:
        handle.remove()
    return made


def assert_close(made: torch.Tensor, expected: torch.Tensor):
    # Sums over fewer terms in float32, a few layers deep.
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("make", [llama, gemma, phi, gpt_neox, gpt2, bert, vit, t5, gemini])
def test_fewer_feed_forward_units_are_units_ignored(make, tmp_path):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = prune(model, width=0.3, compensate=False)
    units = {cut.units for cut in made.report.cuts}
    assert {len(cut.kept) for cut in made.report.cuts} == {kept_units(units.pop(), 0.3, 16)}
    assert made.report.parameters_after < made.report.parameters_before
    for window in windows_for(model):
        assert_close(logits(made.model, window), ignoring(model, made.report, window))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    made.model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path).eval()
    window = windows_for(model)[0]
    assert torch.equal(logits(read, window), logits(made.model, window))


@pytest.mark.parametrize("make", [llama, gemma, t5])
@pytest.mark.parametrize("width", [0.0, 0.3])
def test_fewer_heads_are_heads_ignored(make, width, tmp_path):
    model = make()
    made = prune(model, heads=0.5, width=width, compensate=False)
    assert {cut.kind for cut in made.report.cuts} == ({"heads", "width"} if width else {"heads"})
    for window in windows_for(model):
        assert_close(logits(made.model, window), ignoring(model, made.report, window))
    made.model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path).eval()
    window = windows_for(model)[0]
    assert torch.equal(logits(read, window), logits(made.model, window))


def test_the_configuration_says_what_changed():
    made = prune(llama(), width=0.3, heads=0.5)
    assert made.report.config == {
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    assert made.model.config.head_dim == 8
    assert prune(gpt2(), width=0.25).report.config == {"n_inner": 96}
    assert prune(llama(num_key_value_heads=8), heads=0.5).report.config == {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }


def test_stacks_of_different_width():
    """The encoder's width is 48 and the decoder's 64: two fields, each with its own number."""
    made = prune(bart(), width=0.3, compensate=False)
    assert made.report.config == {"encoder_ffn_dim": 32, "decoder_ffn_dim": 48}
    window = windows_for(bart())[0]
    assert_close(logits(made.model, window), ignoring(bart(), made.report, window))


def test_entries_a_head_go_with_their_heads():
    """Every block has sinks of its own, so that every block chooses its own heads."""
    model = gpt_oss()
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        layer.self_attn.sinks.copy_(torch.randn(8, generator=generator))
    made = prune(model, heads=0.5, compensate=False)
    assert len({cut.kept for cut in made.report.cuts}) > 1
    for layer, old, cut in zip(made.model.model.layers, model.model.layers, made.report.cuts, strict=True):
        kept = [head for group in cut.kept for head in (2 * group, 2 * group + 1)]
        assert torch.equal(layer.self_attn.sinks, old.self_attn.sinks[kept])
    assert_close(logits(made.model, IDS[0]), ignoring(model, made.report, IDS[0]))
    with pytest.raises(RecipeError, match="No width of this model"):
        prune(model, width=0.3)


def test_blocks_that_share_a_table_keep_the_same_heads():
    made = prune(t5(), heads=0.5)
    for stack in ("encoder", "decoder"):
        kept = {cut.kept for cut in made.report.cuts if cut.consumer.startswith(stack)}
        assert len(kept) == 1
    assert made.model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.shape == (32, 2)
    assert made.model.config.num_heads == 2


def slow_statistics(model: nn.Module, name: str) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: rows.append(args[0].flatten(0, -2))
    )
    for ids in IDS:
        logits(model, ids)
    handle.remove()
    x = torch.cat(rows).double()
    return x.T @ x / len(x)


@pytest.mark.parametrize("weighed", [False, True])
def test_what_stays_makes_up_for_what_goes_block_by_block(weighed):
    """Each block sees the corrected blocks before it; the whole chain again with hooks on whole models."""
    model = llama()
    consumers = [f"model.layers.{index}.mlp.down_proj" for index in range(3)]
    fisher = output_fisher(model, IDS, consumers, progress=False) if weighed else None
    made = prune(model, width=0.3, fisher=fisher)
    full, units = copy.deepcopy(model), torch.arange(48)[:, None]
    for cut, name in zip(made.report.cuts, consumers, strict=True):
        hessian = slow_statistics(full, name)
        layer = full.get_submodule(name)
        weight = layer.weight.clone()
        kept, corrected = eliminate(weight, hessian, units, 16, fisher=fisher[name] if weighed else None)
        assert (cut.consumer, cut.kept) == (name, tuple(kept.tolist()))
        wrong = (weight - corrected).double()
        lost = torch.trace(wrong @ hessian @ wrong.T) / torch.trace(
            weight.double() @ hessian @ weight.T.double()
        )
        assert cut.lost == pytest.approx(float(lost), rel=1e-4)
        layer.weight.copy_(corrected)
        # The Hessian is measured block by block in float32; its inverse enlarges what differs.
        found = made.model.get_submodule(name).weight
        torch.testing.assert_close(found, corrected[:, kept], rtol=1e-3, atol=1e-4)
        up = name.replace("down", "up")
        assert torch.equal(made.model.get_submodule(up).weight, model.get_submodule(up).weight[kept])
    assert_close(logits(made.model, IDS[0]), logits(full, IDS[0]))


@pytest.mark.parametrize("options", [{"width": 0.3}, {"heads": 0.5}])
def test_compensation_loses_less(options):
    plain, better = (prune(llama(), compensate=flag, **options).report.cuts for flag in (False, True))
    assert sum(cut.lost for cut in better) < sum(cut.lost for cut in plain)


def test_tied_weights_stay_tied_and_types_stay():
    model = llama(tie_word_embeddings=True)
    made = prune(model, width=0.3).model
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())
    random = torch.random.get_rng_state()
    prune(model, width=0.3)
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize(
    ("units", "fraction", "multiple", "kept"),
    [(1536, 0.25, 32, 1152), (1536, 0.26, 32, 1152), (3, 0.34, 1, 2), (3, 0.9, 1, 1), (48, 0.1, 32, 32),
     (20, 0.5, 32, 20), (100, 0.0, 32, 96)],
)  # fmt: skip
def test_what_stays_is_a_multiple(units, fraction, multiple, kept):
    assert kept_units(units, fraction, multiple) == kept


@pytest.mark.parametrize("make", [gpt2, bert, vit, bart, gemini, gpt_neox, phi])
def test_heads_whose_size_follows_from_their_number_are_refused(make):
    model = make()
    with pytest.raises(RecipeError, match=r"Config has no field that cuts .* from \d to \d units"):
        prune(model, heads=0.5)


def test_what_the_configuration_class_forbids_is_said():
    with pytest.raises(RecipeError, match="not a multiple of the number of attention heads"):
        prune(llama(), heads=0.25)  # 6 heads, and 32 is no multiple of 6


def test_one_group_of_heads_is_refused():
    with pytest.raises(RecipeError, match=r"No heads .*self_attn.o_proj: every output of .* one unit"):
        prune(llama(num_key_value_heads=1), heads=0.5)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0])
def test_shares_out_of_range_are_refused(fraction):
    with pytest.raises(RecipeError, match="fraction to prune"):
        prune(llama(), width=fraction)


def test_nothing_to_cut_is_refused():
    for options in ({}, {"width": 0.01}, {"heads": 0.05}):
        with pytest.raises(RecipeError, match="Nothing would be cut"):
            prune(llama(), **options)


def test_a_model_that_is_not_what_its_configuration_says_is_refused():
    model = llama()
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 40, bias=False)
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.up_proj.weight is not what"):
        prune(model, width=0.3)
    with pytest.raises(CheckpointError, match="training mode"):
        prune(llama().train(), width=0.3)
    with pytest.raises(RecipeError, match="no calibration data"):
        prune_units(llama(), [], width=0.3)
    with pytest.raises(CheckpointError, match="no configuration of transformers"):
        prune_units(nn.Linear(4, 4), IDS, width=0.5)


def test_numbers_that_are_not_finite_are_refused():
    model = llama()
    model.model.embed_tokens.weight[95] = torch.inf  # a token that the first window lacks
    odd = IDS[0].copy()
    odd[0, 3] = 95
    with pytest.raises(RecipeError, match=r"down_proj or what it reads holds values that are not finite"):
        prune_units(model, [IDS[0], odd], width=0.3, multiple=16, progress=False)
    model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="output holds values that are not finite"):
        prune(model, width=0.3)


def test_a_block_that_cannot_be_cut_keeps_all_from_it():
    model = llama()
    found = find_couplings(model, IDS[0], progress=False)
    without = tuple(c for c in found.couplings if (c.block, c.kind) != (2, "width"))
    with pytest.raises(
        RecipeError, match=r"mlp.down_proj has not the same units in all blocks of model.layers"
    ):
        prune(model, width=0.3, structure=Structure(without, ()))


def test_weights_come_back_after_a_failure(monkeypatch):
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("gemini.compress.prune.rebuild", fail)
    with pytest.raises(KeyboardInterrupt):
        prune(model, width=0.3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_is_cut_too():
    model = llama().to(torch.bfloat16)
    made = prune(model, width=0.3)
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.bfloat16}
    assert np.isfinite(made.report.cuts[0].lost)
