"""Units found by marks against what attention and feed-forward are known to be, and against runs."""

import numpy as np
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
    phi,
    t5,
    vit,
    windows_for,
)
from torch import nn
from transformers import LlamaConfig, Olmo2Config, Olmo2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from gemini.compress.structure import Coupling, find_couplings, plain_linears


def runs(start: int, stop: int, size: int) -> list[list[int]]:
    return [list(range(first, first + size)) for first in range(start, stop, size)]


def found_in(model, kind: str) -> list[Coupling]:
    found = find_couplings(model, windows_for(model)[0], progress=False)
    assert not found.refused
    return [coupling for coupling in found.couplings if coupling.kind == kind]


def test_heads_that_share_a_key_and_a_value_are_one_unit():
    for coupling in found_in(llama(), "heads"):
        tables = {name.rsplit(".", 1)[1]: table.tolist() for name, table in coupling.producers.items()}
        assert tables == {"q_proj": runs(0, 64, 16), "k_proj": runs(0, 32, 8), "v_proj": runs(0, 32, 8)}
        assert coupling.columns.tolist() == runs(0, 64, 16)
        assert coupling.site == "self_attn.o_proj"


def test_gate_and_up_belong_to_an_input_of_down():
    couplings = found_in(llama(), "width")
    assert [coupling.block for coupling in couplings] == [0, 1, 2]
    for coupling in couplings:
        each = [[unit] for unit in range(48)]
        assert [table.tolist() for table in coupling.producers.values()] == [each, each]
        assert coupling.columns.tolist() == each


def test_layers_packed_into_one_matrix_come_apart():
    heads, width = found_in(phi(), "heads"), found_in(phi(), "width")
    packed = heads[0].producers["model.layers.0.self_attn.qkv_proj"].tolist()
    assert packed == [[*range(16), *range(32, 40), *range(48, 56)],
                      [*range(16, 32), *range(40, 48), *range(56, 64)]]  # fmt: skip
    gates = width[0].producers["model.layers.0.mlp.gate_up_proj"].tolist()
    assert gates == [[unit, unit + 48] for unit in range(48)]
    side_by_side = found_in(gpt_neox(), "heads")[0]
    assert [table.tolist() for table in side_by_side.producers.values()] == [runs(0, 96, 24)]
    transposed = found_in(gpt2(), "heads")[0]
    assert transposed.producers["transformer.h.0.attn.c_attn"].tolist() == [
        [*range(h, h + 8), *range(32 + h, 40 + h), *range(64 + h, 72 + h)] for h in range(0, 32, 8)
    ]


@pytest.mark.parametrize(
    ("make", "sites", "heads"),
    [(gemma, 6, 2), (bert, 6, 4), (vit, 6, 4), (bart, 12, 4), (t5, 15, 4), (gemini, 15, 4)],
)
def test_every_block_has_its_sites(make, sites, heads):
    model = make()
    found = find_couplings(model, windows_for(model)[0], progress=False)
    assert not found.refused
    assert len(found.couplings) == sites
    assert {coupling.units for coupling in found.couplings if coupling.kind == "heads"} == {heads}
    names = [name for c in found.couplings for name in (*c.producers, c.consumer)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("make", [llama, gemma, phi, gpt_neox, gpt2, bert, vit, bart, t5])
def test_a_unit_whose_columns_are_zero_does_not_count(make):
    """Whatever its producers put out, if the consumer ignores it, nothing changes; nor does anything else."""
    model = make()
    window = {key: torch.as_tensor(v) for key, v in _feed(windows_for(model)[0]).items()}
    couplings = find_couplings(model, windows_for(model)[0], progress=False).couplings
    assert couplings
    for coupling in couplings[:4] + couplings[-3:]:
        unit = coupling.units // 2

        def ignore(module, args, columns=coupling.columns[unit]):
            return (args[0].index_fill(-1, columns, 0.0),)

        def disturb(rows):
            def hook(module, args, output):
                generator = torch.Generator().manual_seed(3)
                noise = torch.randn(*output.shape[:-1], len(rows), generator=generator)
                return output.index_add(-1, rows, noise)

            return hook

        handles = [model.get_submodule(coupling.consumer).register_forward_pre_hook(ignore)]
        with torch.no_grad():
            expected = model(**window).logits
            handles += [
                model.get_submodule(name).register_forward_hook(disturb(table[unit]))
                for name, table in coupling.producers.items()
            ]
            made = model(**window).logits
            handles[0].remove()
            felt = model(**window).logits
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)
        assert (felt - expected).abs().max() > 1e-3  # the disturbance is one


def _feed(window):
    return window if isinstance(window, dict) else {"input_ids": window}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_no_form_of_attention_hides_a_query(implementation):
    model = llama()
    model.set_attn_implementation(implementation)
    assert {coupling.units for coupling in found_in(model, "heads")} == {4}


def test_the_model_is_left_as_it_was():
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.as_tensor(windows_for(model)[0])
    with torch.no_grad():
        expected = model(ids).logits
        find_couplings(model, ids, progress=False)
        assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_one_key_for_all_heads_is_one_unit():
    found = find_couplings(llama(num_key_value_heads=1), windows_for(llama())[0], progress=False)
    assert {coupling.kind for coupling in found.couplings} == {"width"}
    assert [each.name for each in found.refused] == [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]
    assert "one unit" in found.refused[0].reason


def test_a_norm_over_all_queries_binds_them_together():
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = Olmo2ForCausalLM(Olmo2Config(**sizes, num_attention_heads=4, pad_token_id=0)).eval()
    found = find_couplings(model, windows_for(model)[0], progress=False)
    assert {coupling.kind for coupling in found.couplings} == {"width"}
    assert all("one unit" in each.reason for each in found.refused)


class Twisted(LlamaMLP):
    """Its down projection reads the units in another order."""

    def forward(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).flip(-1))


class Leaking(LlamaMLP):
    """A unit also goes past the down projection."""

    def forward(self, x):
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner) + inner[..., :1]


class Counting(LlamaMLP):
    """What its gate says decides which of two functions is computed, and no number passes."""

    def forward(self, x):
        return self.down_proj(torch.where(self.gate_proj(x) > 0, self.up_proj(x), 0.0))


def with_mlp(kind: type[nn.Module], blocks: tuple[int, ...]) -> nn.Module:
    model = llama()
    config: LlamaConfig = model.config
    for index in blocks:
        model.model.layers[index].mlp = kind(config).eval().requires_grad_(False)
    return model


def test_a_block_unlike_the_first_is_followed_itself():
    width = found_in(with_mlp(Twisted, (2,)), "width")
    assert [coupling.columns[0].tolist() for coupling in width] == [[0], [0], [0]]
    assert [coupling.producers[f"model.layers.{i}.mlp.up_proj"][0].tolist() for i, coupling in
            enumerate(width)] == [[0], [0], [47]]  # fmt: skip


def test_outputs_that_leave_the_block_are_refused():
    model = with_mlp(Leaking, (1,))
    found = find_couplings(model, windows_for(model)[0], progress=False)
    refused = {each.name: each.reason for each in found.refused}
    assert "past it" in refused["model.layers.1.mlp.down_proj"]
    assert "model.layers.1.mlp.down_proj" not in {coupling.consumer for coupling in found.couplings}


def test_outputs_that_arrive_nowhere_are_refused_with_their_block():
    model = with_mlp(Counting, (0,))
    found = find_couplings(model, windows_for(model)[0], progress=False)
    assert [(each.name, each.reason) for each in found.refused] == [
        ("model.layers.0", "outputs of mlp.gate_proj reach nothing")
    ]
    assert {coupling.block for coupling in found.couplings} == {1, 2}


def test_a_model_without_a_stack_has_no_units():
    found = find_couplings(llama(num_hidden_layers=1), np.ones((1, 4), int), progress=False)
    assert not found.couplings
    assert "no stack" in found.refused[0].reason


def test_only_layers_that_compute_what_they_say():
    model = llama()
    model.lm_head.forward = lambda x: x
    assert "lm_head" not in plain_linears(model)
    assert "model.layers.0.mlp.up_proj" in plain_linears(model)
