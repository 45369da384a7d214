"""The ladder: wrong forms are caught by numbers, impossible models end in one clear error."""

import numpy as np
import pytest
import torch
from torch import nn

from gemini.errors import ExportError, VerificationError
from gemini.export import exporter, verify
from gemini.export.forms import DECODER_FORMS, ENCODER_DECODER_FORMS
from gemini.export.trace_state import FormMismatch, tracing
from gemini.export.twins.attention import attend
from gemini.export.twins.mask import MaskMeaning, read_mask
from gemini.export.twins.norm import as_norm
from gemini.export.twins.rotary import pair_layout


def test_wrong_rotary_layout_is_refused_by_numbers(make_checkpoint, tmp_path, monkeypatch):
    from gemini.export.twins import rotary

    checkpoint = make_checkpoint("llama")
    monkeypatch.setattr(
        rotary, "pair_layout", lambda function: True
    )  # claims interleaved; llama is half-split
    exported = exporter.export_checkpoint(checkpoint, tmp_path, progress=False)
    assert exported.form == DECODER_FORMS[1]
    assert "differs from torch" in exported.refused[0]


def test_model_with_data_dependent_control_flow_names_reason_and_remedy(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("bert")  # whose ladder is shorter than a decoder's
    inner = checkpoint.model.bert.encoder.layer[1].intermediate
    original = inner.forward
    inner.forward = lambda x: original(x) if x.sum() > 0 else -original(x)
    with pytest.raises(ExportError) as caught:
        exporter.export_checkpoint(checkpoint, tmp_path, progress=False)
    assert "BertForSequenceClassification cannot be exported" in str(caught.value)
    assert "encoder.layer.1.intermediate" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_operator_without_counterpart_names_its_module(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("llama")
    mlp = checkpoint.model.model.layers[1].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(torch.special.bessel_j0(x))
    with pytest.raises(ExportError) as caught:
        exporter.export_checkpoint(checkpoint, tmp_path, progress=False)
    text = str(caught.value)
    assert "layers.1.mlp (LlamaMLP) fails with" in text and "bessel_j0" in text and "\x1b" not in text


def test_experts_without_operator_are_named(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("mixtral")
    for layer in checkpoint.model.model.layers:
        layer.mlp.experts.act_fn = nn.GELU()
    with pytest.raises(ExportError, match="no operator computes what MixtralExperts does"):
        exporter.export_checkpoint(checkpoint, tmp_path, progress=False)


def test_model_without_a_cache_is_refused(make_checkpoint, tmp_path):
    with pytest.raises(ExportError, match="keeps no cache of keys and values"):
        exporter.export_checkpoint(make_checkpoint("openai-gpt"), tmp_path, progress=False)


def test_verification_refuses_nan_and_large_differences():
    record = verify.Verification("form").record
    record("fine", (1, 0, 2), np.ones(3), np.ones(3) + 1e-5)
    for wrong in (np.full(3, np.nan), np.full(3, 1.01)):
        with pytest.raises(VerificationError):
            record("wrong", (1, 0, 2), wrong, np.ones(3))


class _ShiftedGain(nn.Module):
    """A norm that keeps ``gain - 1``."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(32))
        self.eps, self.centred = 1e-6, centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def test_norm_is_recognised_by_what_it_computes():
    torch.manual_seed(0)
    twin = as_norm(_ShiftedGain(centred=False))
    assert twin is not None and twin.epsilon == 1e-6
    assert as_norm(_ShiftedGain(centred=True)) is None
    assert as_norm(nn.Linear(4, 4)) is None


def test_rotary_functions_are_told_apart():
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half_split

    assert pair_layout(half_split) is False
    assert pair_layout(interleaved) is True
    assert pair_layout(lambda q, k, cos, sin: (q, k)) is None


def test_masks_are_read_by_probing():
    from types import SimpleNamespace

    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        sliding_window_bidirectional_mask_function,
        sliding_window_causal_mask_function,
    )

    config = SimpleNamespace(sliding_window=7)
    assert read_mask(mask_function=causal_mask_function, config=config).window is None
    assert read_mask(mask_function=bidirectional_mask_function, config=config).causal is False
    assert read_mask(mask_function=sliding_window_causal_mask_function(7), config=config).window == 7
    near = read_mask(mask_function=sliding_window_bidirectional_mask_function(7), config=config)
    assert near == MaskMeaning(causal=False, window=7, padding=None)
    other = read_mask(mask_function=sliding_window_causal_mask_function(5), config=config)
    states = torch.zeros(1, 2, 4, 8)
    with tracing(DECODER_FORMS[0]), pytest.raises(FormMismatch, match="neither causal"):
        attend(nn.Module(), states, states, states, other)  # made, and used
    with (
        tracing(ENCODER_DECODER_FORMS[0]) as state,
        pytest.raises(FormMismatch, match="vectors of an encoder"),
    ):
        state.cross = SimpleNamespace(holds=lambda key: True)
        attend(nn.Module(), states, states, states, near)
