"""Shallower models against chains of blocks run by hand, and against files."""

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
    llama,
    modern_bert,
    t5,
    vit,
    windows_for,
)
from torch import nn

from gemini.compress.depth import block_influence, least_missed, prune_layers, states_to_have
from gemini.errors import CheckpointError, RecipeError


def logits(model: nn.Module, window) -> torch.Tensor:
    feed = window if isinstance(window, dict) else {"input_ids": window}
    with torch.no_grad():
        return model(**{key: torch.as_tensor(value) for key, value in feed.items()}).logits


def states_of(model: nn.Module, stack: str, window) -> list[torch.Tensor]:
    """What goes into each block of a stack, and what comes out of the last one."""
    seen: list[torch.Tensor] = []
    blocks = list(model.get_submodule(stack))

    def before(_, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(
        blocks[-1].register_forward_hook(
            lambda _, args, made: seen.append(made[0] if isinstance(made, tuple) else made)
        )
    )
    logits(model, window)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("make", "stack"), [(llama, "model.layers"), (t5, "decoder.block"), (vit, "vit.layers")]
)
def test_influence_is_how_far_states_turn(make, stack):
    model = make()
    windows = windows_for(model)
    found = block_influence(model, windows, progress=False)[stack]
    turned = torch.zeros(len(found), dtype=torch.float64)
    positions = 0
    for window in windows:
        states = [state.double().flatten(0, -2) for state in states_of(model, stack, window)]
        positions += len(states[0])
        for index in range(len(found)):
            x, y = states[index], states[index + 1]
            turned[index] += (1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).sum()
    torch.testing.assert_close(found, turned / positions, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [llama, t5])
def test_least_missed_tries_every_block_each_time(make):
    model = make()
    windows = windows_for(model)[:2]
    stacks = ["model.layers"] if make is llama else ["encoder.block", "decoder.block"]
    counts = {stack: 2 - number for number, stack in enumerate(stacks)}
    gone: list[str] = []
    wanted = [torch.softmax(logits(model, window).double(), -1) for window in windows]
    while len(gone) < sum(counts.values()):
        losses = {}
        for stack, count in counts.items():
            left = sum(name.startswith(stack) for name in gone) < count
            for index in range(1 if make is t5 else 0, 3):
                name = f"{stack}.{index}"
                if not left or name in gone:
                    continue
                handles = [
                    model.get_submodule(each).register_forward_hook(_pass_on, with_kwargs=True)
                    for each in [*gone, name]
                ]
                made = [torch.softmax(logits(model, window).double(), -1) for window in windows]
                for handle in handles:
                    handle.remove()
                losses[name] = sum(
                    float((p * (p / q).log()).sum(-1).mean()) for p, q in zip(wanted, made, strict=True)
                )
        gone.append(min(losses, key=losses.get))
    found = least_missed(model, windows, counts, progress=False)
    assert sorted(f"{stack}.{i}" for stack, indices in found.items() for i in indices) == sorted(gone)
    if make is llama:
        report = prune_layers(model, windows, fraction=0.67, by="divergence", progress=False).report
        assert report.kept == {"model.layers": tuple({0, 1, 2} - set(found["model.layers"]))}


def test_a_model_without_logits_is_judged_by_its_states():
    model = llama().model
    assert len(least_missed(model, IDS[:1], {"layers": 1}, progress=False)["layers"]) == 1
    with pytest.raises(RecipeError, match="chosen by 'luck'"):
        prune_layers(model, IDS, fraction=0.34, by="luck", progress=False)


@pytest.mark.parametrize("make", [llama, gemma, gpt2, gpt_neox, bert, modern_bert, vit, bart, t5, gemini])
def test_a_shallower_model_skips_blocks(make, tmp_path):
    model = make()
    windows = windows_for(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = prune_layers(model, windows, fraction=0.34, progress=False)
    report = made.report
    assert report.parameters_after < report.parameters_before
    handles = []
    for stack, kept in report.kept.items():
        blocks = model.get_submodule(stack)
        assert len(made.model.get_submodule(stack)) == len(kept) < len(blocks)
        lowest = sorted(range(len(blocks)), key=lambda i: report.influence[stack][i])
        if make not in (t5, modern_bert):  # whose first blocks stay
            assert set(kept) == set(range(len(blocks))) - set(lowest[: len(blocks) - len(kept)])
        for index in set(range(len(blocks))) - set(kept):
            handles.append(blocks[index].register_forward_hook(_pass_on, with_kwargs=True))
    expected = [logits(model, window) for window in windows]
    for handle in handles:
        handle.remove()
    for window, wanted in zip(windows, expected, strict=True):
        # The same operations on the same numbers.
        torch.testing.assert_close(logits(made.model, window), wanted, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    made.model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(read, windows[0]), logits(made.model, windows[0]))


def _pass_on(_, args, kwargs, made):
    states = args[0] if args else kwargs["hidden_states"]
    return (states, *made[1:]) if isinstance(made, tuple) else states


def test_lists_with_an_entry_a_layer_lose_the_same_ones():
    made = prune_layers(gemma(), IDS, drop={"model.layers": [0]}, progress=False)
    assert made.model.config.layer_types == ["full_attention", "sliding_attention"]
    assert made.report.config["num_hidden_layers"] == 2
    assert made.report.kept == {"model.layers": (1, 2)}


def test_one_stack_alone():
    model = t5()
    made = prune_layers(model, windows_for(model), drop={"decoder.block": [1, 2]}, progress=False)
    assert (made.model.config.num_layers, made.model.config.num_decoder_layers) == (3, 1)
    own = bart()
    made = prune_layers(own, windows_for(own), drop={"model.encoder.layers": [2]}, progress=False)
    assert (made.model.config.encoder_layers, made.model.config.decoder_layers) == (2, 2)


def test_a_cut_model_generates():
    made = prune_layers(llama(), IDS, fraction=0.34, progress=False).model
    ids = torch.as_tensor(IDS[0])
    made.generation_config.eos_token_id = None
    with_cache = made.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(with_cache, made.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ({"decoder.block": [0]}, "has other tensors than the rest"),
        ({"decoder.block": [3]}, "cannot be left out"),
        ({"decoder.block": []}, "cannot be left out"),
        ({"decoder.block": [0, 1, 2]}, "one must stay"),
        ({"nowhere": [0]}, "no stack 'nowhere'"),
    ],
)
def test_blocks_that_must_stay(drop, message):
    model = t5()
    with pytest.raises(RecipeError, match=message):
        prune_layers(model, windows_for(model), drop=drop, progress=False)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_shares_out_of_range(fraction):
    with pytest.raises(RecipeError, match="fraction of layers"):
        prune_layers(llama(), IDS, fraction=fraction, progress=False)


def test_less_than_half_a_layer_is_refused():
    with pytest.raises(RecipeError, match="No layer would be left out"):
        prune_layers(llama(), IDS, fraction=0.1, progress=False)
    with pytest.raises(RecipeError, match="no stack of two"):
        prune_layers(llama(num_hidden_layers=1), IDS, fraction=0.5, progress=False)
    with pytest.raises(CheckpointError, match="no configuration"):
        prune_layers(nn.Linear(2, 2), IDS, fraction=0.5, progress=False)


def test_stacks_that_one_field_counts_cannot_differ():
    """Hybrid fusion shares its encoder layers out among modalities: no number cuts one of them."""
    model = gemini()
    with pytest.raises(RecipeError, match="GeminiConfig has no field"):
        prune_layers(_hybrid(), windows_for(model), drop={"model.encoder.fusion.joint": [0]}, progress=False)


def _hybrid() -> nn.Module:
    from gemini.model.gemini import GeminiConfig, GeminiForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "encoder_layers": 4}
    config = GeminiConfig(vocab_size=96, image_channels=(4, 8, 16), fusion="hybrid", joint_layers=2, **sizes)
    return GeminiForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("drop", "expected"), [([0], [1, 2]), ([1], [1, 2]), ([2], [0, 2]), ([0, 2], [2])])
def test_states_to_have_are_those_before_the_next_block_that_stays(drop, expected):
    model, window = llama(), IDS[0]
    made = prune_layers(model, IDS, drop={"model.layers": drop}, progress=False)
    assert states_to_have(made.report) == expected
    # What a block that stays hands on without a fit is what the next one that stays was given.
    states = states_of(model, "model.layers", window)
    assert len(states) == 4 and len(expected) == 3 - len(drop)
    for index, kept in enumerate(made.report.kept["model.layers"][1:]):
        assert torch.equal(states[kept], states[expected[index] + 1])
    assert states_to_have(prune_layers(t5(), windows_for(t5()), fraction=0.4, progress=False).report) is None
