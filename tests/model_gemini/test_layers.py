"""Layers against torch.nn's with copied weights, and what dropout and the residual connection do."""

from typing import Any

import torch
from torch import nn

from gemini.model.gemini.layers import DecoderLayer, EncoderLayer

TOLERANCE = 1e-5  # float32 sums in another order
LOWEST = torch.finfo(torch.float32).min


def test_encoder_layer_equals_torch(tiny: Any, copy_attention: Any) -> None:
    ours = EncoderLayer(tiny(attn_implementation="eager")).eval()
    theirs = nn.TransformerEncoderLayer(32, 4, 48, activation="gelu", batch_first=True, norm_first=True)
    shake(ours)
    copy_attention(ours.self_attn, theirs.self_attn)
    copy(ours.self_attn_norm, theirs.norm1)
    copy(ours.feed_forward_norm, theirs.norm2)
    copy_feed_forward(ours, theirs)
    x = torch.randn(2, 6, 32)
    padded = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    mask = torch.zeros(2, 1, 6, 6).masked_fill(padded[:, None, None], LOWEST)
    expected = theirs.eval()(x, src_key_padding_mask=padded)
    # torch's fast path leaves padded rows at zero; nobody reads them.
    torch.testing.assert_close(ours(x, mask)[~padded], expected[~padded], atol=TOLERANCE, rtol=0)


def test_decoder_layer_equals_torch(tiny: Any, copy_attention: Any) -> None:
    ours = DecoderLayer(tiny(attn_implementation="eager"), 0).eval()
    theirs = nn.TransformerDecoderLayer(32, 4, 48, activation="gelu", batch_first=True, norm_first=True)
    shake(ours)
    copy_attention(ours.self_attn, theirs.self_attn)
    copy_attention(ours.cross_attn, theirs.multihead_attn)
    copy(ours.self_attn_norm, theirs.norm1)
    copy(ours.cross_attn_norm, theirs.norm2)
    copy(ours.feed_forward_norm, theirs.norm3)
    copy_feed_forward(ours, theirs)
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    causal = torch.full((5, 5), LOWEST).triu(1)
    padded = torch.tensor([[False] * 7, [False] * 3 + [True] * 4])
    mask = torch.zeros(2, 1, 5, 7).masked_fill(padded[:, None, None], LOWEST)
    expected = theirs.eval()(x, memory, tgt_mask=causal, memory_key_padding_mask=padded)
    actual = ours(x, memory, attention_mask=causal[None, None], encoder_attention_mask=mask)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_parts_that_add_nothing_leave_the_input(tiny: Any) -> None:
    layer = EncoderLayer(tiny(attn_implementation="eager"))
    for last in (layer.self_attn.out_proj, layer.feed_forward.fc2):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    x = torch.randn(2, 6, 32)
    assert torch.equal(layer(x), x)


def test_dropout_acts_in_training_only(tiny: Any) -> None:
    layer = EncoderLayer(tiny(dropout=0.5, attn_implementation="eager"))
    x = torch.randn(2, 6, 32)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def shake(module: nn.Module) -> None:
    """Random norms and biases too: fresh ones are 1 and 0, which would hide a missing term."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def copy(ours: Any, theirs: Any) -> None:
    theirs.load_state_dict(ours.state_dict())


def copy_feed_forward(ours: Any, theirs: Any) -> None:
    copy(ours.feed_forward.fc1, theirs.linear1)
    copy(ours.feed_forward.fc2, theirs.linear2)
