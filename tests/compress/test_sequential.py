"""Layer by layer: what each one gets against hooks on whole models, moves against least squares by hand."""

import gc
import weakref

import pytest
import torch
from pruning_models import (
    bart,
    bert,
    gemini,
    gemma,
    gpt2,
    gpt_neox,
    llama,
    modern_bert,
    phi,
    t5,
    vit,
    windows_for,
)
from torch import nn

from gemini.compress import sequential as sequential_module
from gemini.compress.calibrate import as_feed, batches, hush
from gemini.compress.layers import Integers, make_linear, rounded
from gemini.compress.select import weight_of
from gemini.compress.sequential import sequential
from gemini.compress.stream import find_stacks
from gemini.compress.structure import plain_linears


def seen(model: nn.Module, windows: list, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs (rows, K) of a layer in whole runs and what hushes them (rows, 1), batch by batch."""
    kept: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: kept.append(args[0].detach().flatten(0, -2))
    )
    run(model, windows)
    handle.remove()
    return torch.cat(kept).double(), torch.cat([hush(rows) for rows in kept]).double()


def behind(model: nn.Module, windows: list, block: str, writers: list[str]) -> torch.Tensor:
    """The states (rows, D) in whole runs that a block is given, and what these layers of it add to them."""
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in ("", *writers)}
    module = model.get_submodule(block)
    handles = [module.register_forward_pre_hook(lambda _, args: kept[""].append(args[0].flatten(0, -2)))]
    for name in writers:
        handles.append(
            module.get_submodule(name).register_forward_hook(
                lambda _module, _args, output, name=name: kept[name].append(output.flatten(0, -2))
            )
        )
    run(model, windows)
    for handle in handles:
        handle.remove()
    return sum(torch.cat(rows).double() for rows in kept.values())


@torch.no_grad()
def run(model: nn.Module, windows: list) -> None:
    for window in batches(windows):
        model(**as_feed(window))


def untouched(model: nn.Module) -> bool:
    return not any("forward" in vars(m) or m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "make", [llama, gemma, phi, gpt_neox, gpt2, bert, modern_bert, vit, bart, t5, gemini]
)
def test_a_layer_sees_what_changed_before_it_in_its_own_block_too(make):
    model = make()
    windows, names = windows_for(model), list(plain_linears(model))
    taken: list[str] = []
    for turn in sequential(model, windows, names, progress=False):
        assert untouched(model)
        for name in turn.layers:
            x, quiet = seen(model, windows, name)
            x *= quiet
            # Products in float32, and the block runs alone instead of inside of the model.
            torch.testing.assert_close(turn.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        for name in turn.layers:
            with torch.no_grad():
                model.get_submodule(name).weight.mul_(0.9).add_(0.01)
        taken += turn.layers
    paths = [path for path, _ in find_stacks(model, names)]
    assert sorted(taken) == sorted(
        name for name in names if any(name.startswith(f"{path}.") for path in paths)
    )
    assert untouched(model)


@pytest.mark.parametrize(
    ("make", "stack", "writers"),
    [
        (llama, "model.layers", ["self_attn.o_proj", "mlp.down_proj"]),
        (gpt_neox, "gpt_neox.layers", ["attention.dense", "mlp.dense_4h_to_h"]),  # side by side, with biases
        (gpt2, "transformer.h", ["attn.c_proj", "mlp.c_proj"]),  # transposed
        (t5, "encoder.block", ["layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"]),
        (
            t5,
            "decoder.block",
            ["layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"],
        ),
    ],
)
@torch.no_grad()
def test_what_writes_to_the_states_is_to_make_up_for_what_was_lost(make, stack, writers):
    model, whole, damping = make(), make(), 0.5
    windows, names = windows_for(model), list(plain_linears(model))
    moved: list[str] = []
    for turn in sequential(model, windows, names, damping=damping, progress=False):
        for name, move in turn.moves.items():
            if name.startswith(f"{stack}."):
                block = ".".join(name.split(".")[: stack.count(".") + 2])
                place = writers.index(name.removeprefix(f"{block}.")) + 1
                wanted, found = (behind(each, windows, block, writers[:place]) for each in (whole, model))
                x, quiet = seen(model, windows, name)
                # Ridge regression as plain least squares: a row more for each feature.
                ridge = (damping * float((x * quiet).square().sum()) / len(x)) ** 0.5
                rows = torch.cat((x * quiet, ridge * torch.eye(x.shape[1], dtype=torch.float64)))
                rest = nn.functional.pad((wanted - found) * quiet, (0, 0, 0, x.shape[1]))
                step = torch.linalg.lstsq(rows, rest).solution.T
                # Sums of states of a size of 10 and more in float32.
                torch.testing.assert_close(move, step.float(), rtol=1e-3, atol=2e-5)
                moved.append(name.removeprefix(f"{stack}."))
        for name in turn.layers:
            weight = model.get_submodule(name).weight
            weight.mul_(0.95)
    count = len(model.get_submodule(stack))
    assert moved == [f"{index}.{name}" for index in range(count) for name in writers]


@pytest.mark.parametrize("make", [bert, bart, gemma])
def test_where_states_are_normed_on_the_way_nothing_is_moved(make):
    model = make()
    assert not any(turn.moves for turn in sequential(model, windows_for(model), list(plain_linears(model))))


@torch.no_grad()
def test_moves_bring_the_states_nearer_on_text_they_were_not_fitted_to():
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(3, 90, (210, 1, 24), generator=generator)
    whole = llama(num_hidden_layers=4)
    missed = []
    for use in (False, True):
        model = llama(num_hidden_layers=4)
        form = Integers(4, 32)
        for turn in sequential(model, list(texts[:200]), list(plain_linears(model)), progress=False):
            for name in turn.layers:
                parent, _, child = name.rpartition(".")
                old = model.get_submodule(name)
                weight = weight_of(old) + (turn.moves.get(name, 0) if use else 0)
                made = rounded(weight, turn.hessian, form)
                new = make_linear(weight, old.bias, form, turn.hessian.diagonal(), made)
                setattr(model.get_submodule(parent), child, new)
        assert untouched(model)
        differences = [model(t).logits - whole(t).logits for t in texts[200:]]
        missed.append(float(torch.cat(differences).square().mean()))
    assert missed[1] < 0.8 * missed[0]


class Twice(nn.Module):
    """A layer that is called twice, and two that only positive texts reach, one of which writes to states."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.seldom, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.more = nn.Linear(8, 8)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        inside = self.twice(self.twice(states).relu())
        if states.sum() > 0:
            inside = inside + self.seldom(states)
            states = states + self.more(inside)
        return states + self.down(inside)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Twice() for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = nn.functional.one_hot(input_ids, 8).float() - 0.3 * (input_ids[:, :1, None] == 0)
        for layer in self.layers:
            states = layer(states)
        return states


@torch.no_grad()
def test_layers_called_twice_or_seldom_see_every_call():
    torch.manual_seed(0)
    model = Blocks()
    windows = [torch.tensor([[first, 3, 5]]).repeat(1, length) for first, length in ((0, 1), (2, 2), (7, 3))]
    names = list(plain_linears(model))
    taken = []
    for turn in sequential(model, windows, names, progress=False):
        (name,) = turn.layers
        x, quiet = seen(model, windows, name)
        x *= quiet
        torch.testing.assert_close(turn.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        model.get_submodule(name).weight.mul_(0.9)
        taken.append(name.removeprefix("layers."))
    assert taken == [f"{block}.{name}" for block in range(2) for name in ("twice", "seldom", "more", "down")]
    assert untouched(model)


@pytest.mark.parametrize("make", [llama, gemma, gpt2, bart, t5])
@torch.no_grad()
def test_what_comes_behind_the_stacks_sees_what_changed(make):
    model = make()
    windows = windows_for(model)
    before = torch.mul(*seen(model, windows, "lm_head"))
    names = [name for name in plain_linears(model) if name != "lm_head"]
    turns = 0
    for turn in sequential(model, windows, names, after="lm_head", progress=False):
        turns += turn.layers == ("lm_head",)
        for name in turn.layers:
            if name != "lm_head":
                model.get_submodule(name).weight.mul_(0.9).add_(0.01)
    assert turns == 1 and turn.layers == ("lm_head",)
    x = torch.mul(*seen(model, windows, "lm_head"))
    torch.testing.assert_close(turn.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert (x - before).norm() > 1e-3 * before.norm()
    assert untouched(model)


def test_layers_that_are_not_named_take_no_turn():
    model = llama()
    turns = list(sequential(model, windows_for(model), ["model.layers.1.mlp.up_proj"], progress=False))
    assert [turn.layers for turn in turns] == [("model.layers.1.mlp.up_proj",)]


def test_what_a_block_made_goes_with_it(monkeypatch):
    """Reference counts free it: no cycle keeps a block's activations until the collector comes by."""
    blocks: list[weakref.ref] = []
    outputs = sequential_module._BlockRun.outputs

    def noted(block_run):
        blocks.append(weakref.ref(block_run))
        return outputs(block_run)

    monkeypatch.setattr(sequential_module._BlockRun, "outputs", noted)
    gc.disable()
    try:
        model = llama()
        for _ in sequential(model, windows_for(model), list(plain_linears(model)), progress=False):
            assert not any(each() for each in blocks[:-1])
    finally:
        gc.enable()
    assert len(blocks) == 3 and not any(each() for each in blocks)
