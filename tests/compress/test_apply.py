"""Recipes on small models: what is replaced, what is shared, what is left alone and why."""

import numpy as np
import pytest
import torch
from small_models import logits_of, make_llama, make_windows, run
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.pytorch_utils import Conv1D

from gemini.compress.apply import most_sensitive, settled
from gemini.compress.calibrate import collect_input_moments, each_input, watch_inputs
from gemini.compress.layers import LOOKUPS, Integers, rounded
from gemini.compress.modules import (
    Bnb4Linear,
    ChannelwiseLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    SplitEmbedding,
)
from gemini.compress.quantize import quantize
from gemini.compress.reports import LayerReport
from gemini.compress.select import embedding_scale, select_layers
from gemini.compress.specs import PerBlock, PerChannel, QuantizeInt4, QuantizeInt8, QuantizeNF4
from gemini.compress.stream import second_moment
from gemini.errors import RecipeError


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


def make_bart() -> BartForConditionalGeneration:
    """One table for encoder, decoder and head, whose rows the embeddings multiply by 8."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 160}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return BartForConditionalGeneration(
        BartConfig(**sizes, **heads, encoder_ffn_dim=96, decoder_ffn_dim=96, scale_embedding=True)
    )


@pytest.mark.parametrize(
    ("spec", "kind", "limit"),
    [
        # Mean squared logit error relative to the logits' variance; random weights make 4 bits look their
        # worst.
        (QuantizeInt8(), QuantizedLinear, 1e-3),
        (QuantizeInt8(PerChannel()), ChannelwiseLinear, 1e-3),
        (QuantizeInt4(block_size=32), QuantizedLinear, 0.1),
        (QuantizeNF4(), Bnb4Linear, 0.1),
    ],
)
def test_every_linear_is_replaced_and_logits_stay_close(spec, kind, limit):
    model = make_llama()
    before = logits(model)
    (report,) = run(model, spec, calibration=make_windows())
    linears = [name for name, module in model.named_modules() if isinstance(module, kind)]
    assert sum(name.startswith("model.layers") for name in linears) == 2 * 7
    assert not any(isinstance(module, nn.Linear | nn.Embedding) for module in model.modules())
    assert (logits(model) - before).square().mean() < limit * before.var()
    assert {layer.kind for layer in report.layers} == {"linear", "embedding", "tied head"}


def test_tied_embedding_and_head_share_storage_and_are_counted_once():
    model = make_llama(tied=True)
    (report,) = run(model, QuantizeInt4(block_size=32))
    table, head = model.model.embed_tokens, model.lm_head
    assert isinstance(table, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    assert table.qweight.data_ptr() == head.qweight.data_ptr()
    assert table.scales.data_ptr() == head.scales.data_ptr()
    by_kind = {layer.kind: layer for layer in report.layers}
    assert by_kind["tied head"].bytes == 0 and by_kind["embedding"].bytes == 160 * (64 + 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gptq", [True, False])
def test_a_split_table_is_two_tables_one_after_the_other(tied, gptq):
    """Against tables packed part by part, by hand."""
    model, plain = make_llama(tied), make_llama(tied)
    windows = make_windows()
    options = {"block_size": 32, "embedding_block_size": 32, "embedding_bits": 4, "gptq": gptq}
    (report,) = run(model, QuantizeInt4(**options, embedding_wide_share=0.25), calibration=windows)
    run(plain, QuantizeInt4(**options), calibration=windows)
    first = 32  # a quarter of 160, to a multiple of 16
    weights = make_llama(tied).model.embed_tokens.weight, make_llama(tied).lm_head.weight
    ends = model.model.embed_tokens, model.lm_head
    for end, weight, other in zip(ends, weights, (plain.model.embed_tokens, plain.lm_head), strict=True):
        table = end.weight
        wide = quantize(weight[:first], bits=8, block_size=32, symmetric=True).dequantized()
        torch.testing.assert_close(table[:first], wide)
        torch.testing.assert_close(table[first:], other.weight[first:])
        assert torch.equal(end.dequantized(), table)
    ids, states = torch.tensor([[0, 31, 32, 159], [3, 100, 31, 32]]), torch.randn(2, 3, 64)
    assert torch.equal(ends[0](ids), ends[0].weight[ids])
    torch.testing.assert_close(ends[1](states), nn.functional.linear(states, ends[1].weight))
    shared = [
        a.qweight.data_ptr() == b.qweight.data_ptr() for a, b in zip(*(e.parts for e in ends), strict=True)
    ]
    assert shared == [tied, tied]
    counted = [(layer.bits, layer.parameters) for layer in report.layers if layer.kind != "linear"]
    own = [(8, 32 * 64), (4, 128 * 64)]
    assert counted == own + ([(8, 0), (4, 0)] if tied else own)


def test_the_first_rows_of_a_table_may_have_smaller_blocks_of_as_many_bits():
    model, plain = make_llama(), make_llama()
    options = {"block_size": 32, "embedding_block_size": 32, "embedding_bits": 4}
    smaller = {"embedding_wide_share": 0.25, "embedding_wide_bits": 4, "embedding_wide_block_size": 16}
    (report,) = run(model, QuantizeInt4(**options, **smaller), calibration=make_windows())
    run(plain, QuantizeInt4(**{**options, "embedding_block_size": 16}), calibration=make_windows())
    assert [(part.bits, part.block_size) for part in model.lm_head.parts] == [(4, 16), (4, 32)]
    torch.testing.assert_close(model.lm_head.weight[:32], plain.lm_head.weight[:32])
    embedding = [layer for layer in report.layers if layer.kind == "embedding"]
    # Codes, and for each block a scale of two bytes and half a byte of zero point.
    assert [layer.bytes for layer in embedding] == [32 * (32 + 4 * 2.5), 128 * (32 + 2 * 2.5)]


def test_embeddings_of_encoder_and_decoder_share_one_table_with_a_factor_each():
    model = make_bart()
    model.model.decoder.embed_tokens.embed_scale = 1.0
    model.eval().requires_grad_(False)
    (report,) = run(model, QuantizeInt8())
    parts = (model.model.encoder.embed_tokens, model.model.decoder.embed_tokens, model.model.shared)
    assert all(isinstance(part, QuantizedEmbedding) for part in parts)
    assert {part.qweight.data_ptr() for part in (*parts, model.lm_head)} == {model.lm_head.qweight.data_ptr()}
    assert [part.scale_by for part in parts] == [8.0, None, 8.0]
    assert sum(layer.kind == "embedding" for layer in report.layers) == 1


def test_copies_of_a_split_table_share_its_parts():
    model = make_bart()
    model.eval().requires_grad_(False)
    run(model, QuantizeInt4(block_size=32, embedding_bits=4, embedding_wide_share=0.25))
    tables = (model.model.encoder.embed_tokens, model.model.decoder.embed_tokens, model.model.shared)
    assert all(isinstance(table, SplitEmbedding) for table in tables)
    for number in (0, 1):
        parts = [each.parts[number] for each in (*tables, model.lm_head)]
        assert len({part.qweight.data_ptr() for part in parts}) == 1
        assert [part.scale_by for part in parts[:3]] == [8.0] * 3


def test_tying_is_found_by_comparing_numbers_not_by_the_flag():
    model = make_llama(tied=False)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    run(model, QuantizeInt8())
    assert model.lm_head.qweight.data_ptr() == model.model.embed_tokens.qweight.data_ptr()


def test_an_untied_head_gets_its_own_table_at_the_embedding_width():
    model = make_llama(tied=False)
    (report,) = run(model, QuantizeInt4(block_size=32))
    assert model.lm_head.bits == 8
    assert model.lm_head.qweight.data_ptr() != model.model.embed_tokens.qweight.data_ptr()
    assert {"head", "embedding"} <= {layer.kind for layer in report.layers}


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_bits_32_leaves_table_and_head_alone(tied):
    model = make_llama(tied=tied)
    (report,) = run(model, QuantizeInt4(block_size=32, embedding_bits=32))
    assert isinstance(model.lm_head, nn.Linear) and isinstance(model.model.embed_tokens, nn.Embedding)
    assert {item.name for item in report.skipped} >= {"lm_head", "model.embed_tokens"}


def test_a_skip_pattern_on_one_end_of_a_tied_pair_keeps_both():
    model = make_llama(tied=True)
    (report,) = run(model, QuantizeInt4(block_size=32, skip=("lm_head", "*.down_proj")))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reasons = {item.name: item.reason for item in report.skipped}
    assert "skips lm_head" in reasons["lm_head"] and "shares" in reasons["model.embed_tokens"]
    assert "skips *.down_proj" in reasons["model.layers.1.mlp.down_proj"]


def test_conv1d_layers_keep_their_meaning_and_positions_stay_float():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=160, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    before = logits(model)
    (report,) = run(model, QuantizeInt8())
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    assert isinstance(model.transformer.wpe, nn.Embedding) and isinstance(
        model.transformer.wte, QuantizedEmbedding
    )
    assert any("positions" in item.reason for item in report.skipped if item.name == "transformer.wpe")
    assert (logits(model) - before).square().mean() < 1e-3 * before.var()  # 8 bits


def test_an_encoder_gets_its_token_table_quantized_too():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=160,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    model = BertModel(config).eval().requires_grad_(False)
    (report,) = run(model, QuantizeInt8())
    assert isinstance(model.embeddings.word_embeddings, QuantizedEmbedding)
    assert isinstance(model.embeddings.position_embeddings, nn.Embedding)
    assert sum(layer.kind == "linear" for layer in report.layers) == 6 + 1  # one block and the pooler


def test_bits_per_weight_counts_scales_and_zero_points():
    model = make_llama()
    (report,) = run(model, QuantizeInt4(block_size=32, embedding_bits=32))
    # 4 bits + 16 for each scale of 32 weights + 4 for its zero point; 64 columns hold an even number of
    # blocks, and down_proj (96 columns, 3 blocks) pads one nibble a row.
    weights = sum(layer.parameters for layer in report.layers)
    padding = 4 * sum(layer.parameters // 96 for layer in report.layers if "down_proj" in layer.name)
    assert report.bits_per_weight == pytest.approx(4 + 20 / 32 + padding / weights, rel=1e-9)


def test_relative_error_is_weighted_by_the_moments():
    model, reference = make_llama(), make_llama()
    windows = make_windows()
    name = "model.layers.0.mlp.down_proj"
    moments = collect_input_moments(reference, windows, [name], progress=False)[name]
    (report,) = run(model, QuantizeInt4(block_size=32), calibration=windows)
    weight = reference.get_submodule(name).weight.double()
    wrong = ((weight - model.get_submodule(name).dequantized()).square() * moments).sum()
    expected = float(wrong / (weight.square() * moments).sum())
    layer = next(layer for layer in report.layers if layer.name == name)
    assert layer.relative_error == pytest.approx(expected, rel=1e-4)  # float32 sums
    assert report.calibration_windows == 3


def test_gptq_keeps_the_outputs_nearer_and_repeats_itself():
    windows = make_windows(12, 48)
    original = logits_of(make_llama(), windows)
    found = {}
    for chosen in (False, True, True):
        model = make_llama()
        (report,) = run(
            model, QuantizeInt4(block_size=32, gptq=chosen, embedding_bits=32), calibration=windows
        )
        made = logits_of(model, windows)
        assert report.calibration_windows == 12 and report.options["gptq"] is chosen
        if chosen in found:
            assert torch.equal(found[chosen], made)
        found[chosen] = made
    errors = {chosen: float((made - original).square().mean()) for chosen, made in found.items()}
    assert errors[True] < 0.8 * errors[False]


def test_gptq_quantizes_each_layer_for_what_the_ones_before_put_out():
    """A layer against GPTQ done by hand on inputs caught behind the block and the attention before it."""
    windows, spec = make_windows(12, 48), QuantizeInt4(block_size=32, gptq=True, embedding_bits=32)
    model = make_llama()
    run(model, spec, calibration=windows)
    half = make_llama()
    half.model.layers[0] = model.model.layers[0]
    half.model.layers[1].self_attn = model.model.layers[1].self_attn
    name = "model.layers.1.mlp.gate_proj"
    rows = []
    with each_input({name: half.get_submodule(name)}, lambda _, x: rows.append(x[0])):
        logits_of(half, windows)
    inputs = torch.cat(rows).double()
    weight, hessian = make_llama().get_submodule(name).weight, inputs.T @ inputs / len(inputs)
    expected = rounded(weight, hessian, Integers(4, 32, symmetric=False, fit="moments")).dequantized()
    made = model.get_submodule(name).dequantized()
    # Sums in another order may tip a code or a scale that lies between two.
    assert torch.isclose(made, expected, rtol=2e-3, atol=1e-6).float().mean() > 0.99


def test_the_most_sensitive_layers_get_8_bits_within_their_share():
    plain = run(make_llama(), QuantizeInt4(block_size=32), calibration=make_windows())[0]
    model = make_llama()
    (report,) = run(model, QuantizeInt4(block_size=32, sensitive_share=0.1), calibration=make_windows())
    linears = [layer for layer in plain.layers if layer.kind == "linear"]
    worst = max(linears, key=lambda layer: layer.relative_error if layer.parameters < 64 * 80 else 0)
    wide = [layer for layer in report.layers if layer.kind == "linear" and layer.bits == 8]
    assert 0 < sum(layer.parameters for layer in wide) <= 0.1 * sum(layer.parameters for layer in linears)
    assert worst.name in {layer.name for layer in wide}
    assert isinstance(model.get_submodule(worst.name), QuantizedLinear)
    assert model.get_submodule(worst.name).bits == 8
    errors = {layer.name: layer.relative_error for layer in linears}
    assert all(layer.relative_error < 0.05 * errors[layer.name] for layer in wide)


def test_a_tied_table_of_4_bits_is_rounded_for_the_head():
    """By GPTQ over the head's inputs plus a share of the identity, with the blocks before it quantized."""
    windows = make_windows(12, 48)
    spec = QuantizeInt4(block_size=32, gptq=True, embedding_bits=4, embedding_block_size=16)
    model, original = make_llama(), make_llama()
    run(model, spec, calibration=windows)
    body = make_llama()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and name != "lm_head":
            body.set_submodule(name, module)
    body.model.embed_tokens = original.model.embed_tokens
    hessian = second_moment(body, windows, "lm_head")
    hessian += LOOKUPS * hessian.diagonal().mean() * torch.eye(len(hessian))
    weight = original.lm_head.weight
    expected = rounded(weight, hessian, Integers(4, 16, symmetric=False, fit="moments")).dequantized()
    table = model.model.embed_tokens
    assert table.qweight.data_ptr() == model.lm_head.qweight.data_ptr()
    # Sums in another order may tip a code or a scale that lies between two.
    assert torch.isclose(table.dequantized(), expected, rtol=2e-3, atol=1e-6).float().mean() > 0.99


def test_sensitive_layers_are_taken_by_error_while_they_fit():
    def layer(name: str, parameters: int, error: float) -> LayerReport:
        return LayerReport(name, "linear", 4, 32, False, parameters, parameters // 2, error)

    layers = [layer("a", 10, 0.1), layer("b", 60, 0.4), layer("c", 20, 0.3), layer("d", 10, 0.3)]
    assert most_sensitive(layers, 0.3) == ["c", "d"]  # b would exceed 30 of the 100 weights
    assert most_sensitive(layers, 0.0) == []
    assert most_sensitive(layers, 1.0) == ["b", "c", "d", "a"]


def test_two_runs_give_identical_bytes():
    first, second = make_llama(), make_llama()
    for model in (first, second):
        run(model, QuantizeInt4(block_size=32), calibration=make_windows())
    for (name, a), (_, b) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes(), name


def test_moments_equal_a_direct_sum_in_float64():
    model = make_llama()
    windows = make_windows()
    name = "model.layers.0.self_attn.q_proj"
    seen = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _m, args, _o: seen.append(args[0].double())
    )
    for window in windows:
        model(input_ids=torch.as_tensor(window))
    handle.remove()
    got = collect_input_moments(model, iter(windows), [name], progress=False)[name]
    assert got.dtype == torch.float64
    # 1e-6: squares are taken in float32, only the sum is float64.
    torch.testing.assert_close(got, torch.cat(seen, 1)[0].square().mean(0), rtol=1e-6, atol=0)


def test_hooks_are_removed_after_an_exception_and_after_success():
    model = make_llama()
    names = ["lm_head", "model.layers.0.mlp.up_proj"]
    with pytest.raises(RuntimeError, match="boom"), watch_inputs(model, names):
        assert len(model.lm_head._forward_pre_hooks) == 1
        raise RuntimeError("boom")
    collect_input_moments(model, make_windows(1), names, progress=False)
    with pytest.raises(IndexError):
        collect_input_moments(model, [np.array([[10**6]])], names, progress=False)
    with pytest.raises(AttributeError):
        collect_input_moments(model, make_windows(1), ["lm_head", "no.such.layer"], progress=False)
    assert not any(module._forward_pre_hooks for module in model.modules())


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 8.0


class ShiftedEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1.0


class Small(nn.Module):
    """An embedding of the given kind and two linear layers, with the parts a pass must leave alone."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.conv = nn.Conv1d(64, 64, 3)
        self.score = nn.Linear(64, 2)
        self.gate = nn.Linear(64, 16, bias=False)
        self.experts = nn.ParameterDict({"stack": nn.Parameter(torch.randn(16, 8, 64))})

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids):
        return self.second(self.first(self.table(input_ids)))


def test_a_constant_factor_of_an_embedding_is_kept():
    torch.manual_seed(0)
    model = Small(ScaledEmbedding(160, 64)).requires_grad_(False)
    ids = torch.arange(160)
    before = model.table(ids)
    run(model, QuantizeInt8())
    assert isinstance(model.table, QuantizedEmbedding) and model.table.scale_by == 8.0
    assert (model.table(ids) - before).abs().max() < 8 * 4.5 / 128  # half a step of the largest value
    assert embedding_scale(nn.Embedding(160, 64)) == 1.0


def test_an_embedding_that_does_more_than_look_up_is_skipped_with_the_reason():
    model = Small(ShiftedEmbedding(160, 64)).requires_grad_(False)
    selection = select_layers(model, 64, (), 64)
    reasons = {item.name: item.reason for item in selection.skipped}
    assert selection.embedding is None and "more than look up" in reasons["table"]


def test_convolutions_experts_routers_and_tiny_layers_are_skipped_with_reasons():
    model = Small(nn.Embedding(160, 64)).requires_grad_(False)
    selection = select_layers(model, 64, (), 64)
    reasons = {item.name: item.reason for item in selection.skipped}
    assert selection.linears == ("first", "second") and selection.embedding == "table"
    assert "Conv1d" in reasons["conv"] and "3-D" in reasons["experts.stack"]
    assert "routes" in reasons["gate"] and "too few" in reasons["score"]


def test_linears_that_share_a_weight_are_skipped():
    model = Small(nn.Embedding(160, 64))
    model.second.weight = model.first.weight
    selection = select_layers(model, 64, (), 64)
    reasons = {item.name: item.reason for item in selection.skipped}
    assert selection.linears == () and "shared with second" in reasons["first"]


def test_a_module_with_two_parents_is_replaced_in_both():
    model = Small(nn.Embedding(160, 64)).requires_grad_(False)
    model.alias = nn.Sequential(model.first)
    run(model, QuantizeInt8())
    assert model.alias[0] is model.first and isinstance(model.first, QuantizedLinear)


def test_a_pass_that_finds_nothing_is_an_error_with_a_reason():
    with pytest.raises(RecipeError, match=r"finds no layer.*skips \*"):
        run(make_llama(), QuantizeInt4(skip=("*",)))


def test_default_int8_is_per_block_for_generators_and_per_channel_for_encoders():
    spec = QuantizeInt8()
    assert settled(spec, "decoder").granularity == PerBlock()
    assert settled(spec, "encoder").granularity == settled(spec, "vision").granularity == PerChannel()
    assert settled(QuantizeInt8(granularity=PerBlock(32)), "encoder").granularity == PerBlock(32)
