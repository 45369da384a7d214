"""Products fitted after a cut, against a least-squares problem written out by hand."""

import copy

import pytest
import torch
from pruning_models import IDS, bart, bert, gemini, gemma, gpt2, gpt_neox, llama, t5, windows_for
from torch import nn

from gemini.compress.depth import prune_layers
from gemini.compress.prune import prune_units
from gemini.compress.refit import refit
from gemini.compress.stream import find_stacks, record_calls
from gemini.compress.structure import plain_linears
from gemini.compress.writers import find_writers


def text(count: int, length: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(3, 90, (1, length), generator=generator) for _ in range(count)]


def without(model: nn.Module, block: int) -> nn.Module:
    return prune_layers(model, IDS, drop={"model.layers": [block]}, progress=False).model


def seen(model: nn.Module, layer: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of a layer (rows, K) and the states that leave the last block (rows, D)."""
    kept: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(layer).register_forward_pre_hook(lambda _, args: kept.update(z=args[0])),
        model.model.norm.register_forward_pre_hook(lambda _, args: kept.update(s=args[0])),
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return kept["z"].flatten(0, 1), kept["s"].flatten(0, 1)


@torch.no_grad()
def test_the_last_product_solves_its_least_squares_problem():
    whole = llama()
    windows, damping = text(6), 0.5
    smaller = without(whole, 2)  # the last of three: block 1 now has to put out what block 2 did
    found = refit(smaller, whole, windows, {"model.layers": (0, 1)}, damping=damping, progress=False)
    assert [each.name for each in found] == ["model.layers.1.mlp.down_proj"]

    before = without(whole, 2)
    layer = "model.layers.1.mlp.down_proj"
    ids = torch.cat(windows)
    target = seen(whole, layer, ids)[1]
    sizes = target.norm(dim=1)
    weights = (3 * sizes.median() / sizes).clamp(max=1)[:, None]  # of one batch: all six windows fit
    z, states = seen(before, layer, ids)
    inputs, rest = (z * weights).double(), ((target - states) * weights).double()
    energy = float((target * weights).square().sum())
    ridge = damping * float(inputs.square().sum()) / len(inputs)
    # Ridge regression as plain least squares: a row more for each feature.
    rows = torch.cat((inputs, ridge**0.5 * torch.eye(inputs.shape[1], dtype=torch.float64)))
    wanted = torch.cat((rest, torch.zeros(inputs.shape[1], rest.shape[1], dtype=torch.float64)))
    step = torch.linalg.lstsq(rows, wanted).solution.T
    old = before.get_submodule(layer).weight
    torch.testing.assert_close(smaller.get_submodule(layer).weight, old + step.float(), rtol=0, atol=2e-5)
    missed = float((rest - inputs @ step.T).square().sum())
    assert found[0].before == pytest.approx(float(rest.square().sum()) / energy, rel=1e-4)
    assert found[0].after == pytest.approx(missed / energy, rel=1e-3)
    assert found[0].after < 0.9 * found[0].before


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (llama, {"model.layers": ["self_attn.o_proj", "mlp.down_proj"]}),
        (gpt2, {"transformer.h": ["attn.c_proj", "mlp.c_proj"]}),
        (gpt_neox, {"gpt_neox.layers": ["attention.dense", "mlp.dense_4h_to_h"]}),
        (
            t5,
            {
                "encoder.block": ["layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"],
                "decoder.block": [
                    "layer.0.SelfAttention.o",
                    "layer.1.EncDecAttention.o",
                    "layer.2.DenseReluDense.wo",
                ],
            },
        ),
        (bert, {"bert.encoder.layer": []}),  # these norm the states behind every product
        (bart, {"model.encoder.layers": [], "model.decoder.layers": []}),
        (gemma, {"model.layers": []}),
    ],
)
def test_products_that_write_to_the_states_are_found_by_running(make, expected):
    model = make()
    windows = [torch.as_tensor(w) if not isinstance(w, dict) else w for w in windows_for(model)[:1]]
    found = {}
    for path, stack in find_stacks(model, plain_linears(model)):
        call = record_calls(model, stack, windows)[0][0]
        found[path] = find_writers(stack[0], call, call.states)
    assert found == expected


@pytest.mark.parametrize("make", [gpt2, gpt_neox, t5, gemini])
@torch.no_grad()
def test_a_narrower_model_comes_nearer_on_text_it_was_not_fitted_to(make):
    whole = make()
    state = copy.deepcopy(whole.state_dict())

    def feeds(count):
        ids = text(count, 40)
        if not whole.config.is_encoder_decoder:
            return ids
        return [{"input_ids": each, "decoder_input_ids": each.flip(1)} for each in ids]

    cut = prune_units(whole, feeds(20), width=0.34, multiple=8, compensate=False, progress=False)
    smaller = cut.model

    def distance(model):
        total = 0.0
        for window in feeds(5):
            feed = window if isinstance(window, dict) else {"input_ids": window}
            total += float((model(**feed).logits - whole(**feed).logits).square().mean())
        return total

    before = distance(smaller)
    found = refit(smaller, whole, feeds(40), progress=False)
    assert found and all(each.after < each.before for each in found)
    assert distance(smaller) < 0.7 * before
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@torch.no_grad()
def test_a_model_that_lost_nothing_stays_as_it_is():
    whole, same = llama(), llama()
    assert refit(same, whole, text(3), progress=False) == ()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
