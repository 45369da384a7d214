"""Mixed precision on a small Llama: within its bytes, better than one format for all, tied tables once."""

import math

import pytest
import torch
from small_models import logits_of, make_llama, make_windows, run

from gemini.compress.apply import select_mixed
from gemini.compress.modules import QuantizedEmbedding, QuantizedLinear
from gemini.compress.plan import FORMATS, TABLE_FORMATS, plan_formats, scan_formats
from gemini.compress.specs import MIXED_FORMATS, SPLIT_FORMATS, QuantizeInt4, QuantizeMixed, spec_from_dict
from gemini.errors import RecipeError

WINDOWS = make_windows(6, 32)


def scan(model=None):
    model = model or make_llama()
    return scan_formats(model, select_mixed(model, QuantizeMixed()), WINDOWS, progress=False)


def plan(bits, model=None):
    return plan_formats(scan(model), target_bpw=bits)


def divergence(model):
    """KL from the model as it was, nats a token."""
    p, q = (logits_of(each, WINDOWS).double().log_softmax(-1) for each in (make_llama(), model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_more_bits_lose_less_and_none_exceed_their_budget():
    known = scan()
    found = [plan_formats(known, target_bpw=bits) for bits in (4.8, 5.5, 6.5, 9.0)]
    assert all(each.bits_per_weight <= bits for each, bits in zip(found, (4.8, 5.5, 6.5, 9.0), strict=True))
    losses = [each.expected_loss for each in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.05 * plan_formats(known, loss=math.inf).expected_loss  # that of the fewest bytes
    assert set(found[-1].formats.values()) == {"int8-64"}


def test_a_loss_asked_for_is_reached_and_a_larger_one_takes_fewer_bytes():
    known = scan()
    asked = [plan_formats(known, target_bpw=bits).expected_loss for bits in (4.8, 5.5, 6.5)]
    found = [plan_formats(known, loss=loss) for loss in asked]
    assert all(each.expected_loss <= loss for each, loss in zip(found, asked, strict=True))
    assert found[0].bytes < found[1].bytes < found[2].bytes < plan_formats(known).bytes


def test_the_expected_loss_is_about_the_one_that_comes():
    model = make_llama()
    expected = plan(5.0).expected_loss
    run(model, QuantizeMixed(target_bpw=5.0, gptq=False), calibration=WINDOWS)
    # Errors of different kinds of layers are taken to be independent of each other.
    assert 0.6 < expected / divergence(model) < 1.7


def test_a_mixture_beats_one_format_of_as_many_bits():
    mixed, plain = make_llama(), make_llama()
    (report,) = run(plain, QuantizeInt4(block_size=32, embedding_block_size=32), calibration=WINDOWS)
    (own,) = run(mixed, QuantizeMixed(report.bits_per_weight, gptq=False), calibration=WINDOWS)
    assert own.bits_per_weight <= report.bits_per_weight
    assert divergence(mixed) < divergence(plain)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_planned_is_what_is_built(tied):
    model = make_llama(tied)
    formats = plan(5.0, make_llama(tied))
    (report,) = run(model, QuantizeMixed(5.0), calibration=WINDOWS)
    assert report.bits_per_weight <= 5.0 and report.calibration_windows == len(WINDOWS)
    for name, form in formats.formats.items():
        layer = model.get_submodule(name)
        spans = TABLE_FORMATS[form].parts(160) if form in SPLIT_FORMATS else [(slice(0, 160), FORMATS[form])]
        parts = list(layer.parts) if form in SPLIT_FORMATS else [layer]
        for part, (span, integers) in zip(parts, spans, strict=True):
            assert isinstance(part, QuantizedEmbedding if "embed" in name else QuantizedLinear)
            assert (part.bits, part.block_size) == (integers.bits, integers.block_size)
            assert "embed" not in name or len(part.qweight) == span.stop - span.start
    ends = [list(end.parameters()) + list(end.buffers()) for end in (model.model.embed_tokens, model.lm_head)]
    assert [each.shape for each in ends[0]] == [each.shape for each in ends[1]]
    assert all((a.data_ptr() == b.data_ptr()) is tied for a, b in zip(*ends, strict=True))


def test_rows_that_are_predicted_often_are_worth_more_bits():
    model = make_llama()
    embedding = model.model.embed_tokens.weight
    embedding[32:] *= 0.1  # logits near 0: what is predicted is among the first 32
    known = scan(model).choices["model.embed_tokens"]
    by_name = {choice.format: choice for choice in known}
    assert set(by_name) == set(TABLE_FORMATS)
    small, split, wide = (by_name[name] for name in ("int4-32", "split-4", "int8-64"))
    assert 0.1 < (split.bytes - small.bytes) / (wide.bytes - small.bytes) < 0.3  # 32 of 160 rows
    assert split.loss - wide.loss < 0.2 * (small.loss - wide.loss)
    (report,) = run(
        model, QuantizeMixed(formats={"model.embed_tokens": "split-4"}, gptq=False), calibration=WINDOWS
    )
    assert sum(layer.bytes for layer in report.layers) == split.bytes
    assert [(layer.name, layer.bits) for layer in report.layers if layer.bytes] == [
        ("model.embed_tokens.parts.0", 8),
        ("model.embed_tokens.parts.1", 4),
    ]


@pytest.mark.parametrize("gptq", [True, False])
def test_formats_settled_beforehand_give_the_same_model(gptq):
    planned, settled = make_llama(), make_llama()
    formats = plan(5.0).formats
    run(planned, QuantizeMixed(5.0, gptq=gptq), calibration=WINDOWS)
    run(settled, QuantizeMixed(formats=formats, gptq=gptq), calibration=WINDOWS)
    assert torch.equal(logits_of(planned, WINDOWS), logits_of(settled, WINDOWS))


def test_what_the_formats_do_not_name_stays_as_it_is():
    model = make_llama()
    (report,) = run(
        model, QuantizeMixed(formats={"model.layers.0.mlp.up_proj": "int8-64"}), calibration=WINDOWS
    )
    assert [(layer.name, layer.bits) for layer in report.layers] == [("model.layers.0.mlp.up_proj", 8)]
    assert "model.layers.1.mlp.up_proj" in {skipped.name for skipped in report.skipped}
    assert isinstance(model.model.embed_tokens, torch.nn.Embedding)


def test_unknown_formats_and_recipes_survive_or_are_refused():
    spec = QuantizeMixed(formats={"a.b": "int4-32"})
    assert spec_from_dict(spec.to_dict()) == spec and set(MIXED_FORMATS) == set(FORMATS)
    assert set(MIXED_FORMATS + SPLIT_FORMATS) == set(TABLE_FORMATS)
    with pytest.raises(RecipeError, match=r"format of `a\.b` is 'int5'"):
        QuantizeMixed(formats={"a.b": "int5"})


def test_impossible_budgets_and_missing_text_are_refused():
    with pytest.raises(RecipeError, match=r"4\.1 bits a weight are too few"):
        run(make_llama(), QuantizeMixed(4.1), calibration=WINDOWS)
    with pytest.raises(RecipeError, match="needs calibration"):
        run(make_llama(), QuantizeMixed())
    with pytest.raises(RecipeError, match="target_bpw"):
        QuantizeMixed(3.0)


def test_other_models_are_planned_too():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=160, num_attention_heads=2, **sizes)).eval()
    (report,) = run(model.requires_grad_(False), QuantizeMixed(5.5), calibration=WINDOWS)
    assert report.bits_per_weight <= 5.5 and len({layer.bits for layer in report.layers}) == 2
