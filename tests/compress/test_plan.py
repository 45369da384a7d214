"""Mixed precision on a small Llama: within its bytes, better than one format for all, tied tables once."""

import pytest
import torch
from small_models import logits_of, make_llama, make_windows, run

from gemini.compress.layers import Integers
from gemini.compress.modules import QuantizedEmbedding, QuantizedLinear
from gemini.compress.plan import plan_formats
from gemini.compress.select import select_layers
from gemini.compress.specs import QuantizeInt4, QuantizeMixed
from gemini.errors import RecipeError

WINDOWS = make_windows(6, 32)


def plan(bits, model=None):
    model = model or make_llama()
    return plan_formats(model, select_layers(model, 32, (), 32), WINDOWS, bits, progress=False)


def divergence(model):
    """KL from the model as it was, nats a token."""
    p, q = (logits_of(each, WINDOWS).double().log_softmax(-1) for each in (make_llama(), model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_more_bits_lose_less_and_none_exceed_their_budget():
    found = [plan(bits) for bits in (4.8, 5.5, 6.5, 9.0)]
    assert all(each.bits_per_weight <= bits for each, bits in zip(found, (4.8, 5.5, 6.5, 9.0), strict=True))
    losses = [each.expected_loss for each in found]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.05 * losses[0]
    assert set(found[-1].formats.values()) == {Integers(8, 64)} == {found[-1].table}


def test_the_expected_loss_is_about_the_one_that_comes():
    model = make_llama()
    expected = plan(5.0).expected_loss
    run(model, QuantizeMixed(target_bpw=5.0, gptq=False), calibration=WINDOWS)
    # Errors are taken to be independent of each other, and inputs of each other.
    assert 0.4 < expected / divergence(model) < 2.5


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
        assert isinstance(layer, QuantizedLinear) and (layer.bits, layer.block_size) == (
            form.bits,
            form.block_size,
        )
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, QuantizedEmbedding) and embedding.bits == head.bits == formats.table.bits
    assert (embedding.qweight.data_ptr() == head.qweight.data_ptr()) is tied


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
