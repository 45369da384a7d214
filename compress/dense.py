"""Packed layers as plain ones for a while: the same numbers, without unpacking on every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gemini.compress.experts import PackedStack
from gemini.compress.modules import Bnb4Linear, ChannelwiseLinear, QuantizedLinear
from gemini.model.disk import kept

PACKED = (QuantizedLinear, ChannelwiseLinear, Bnb4Linear)


@contextmanager
def dense_weights(model: nn.Module) -> Iterator[None]:
    """Replace every packed linear by a float32 one with its dequantized weight while the block runs.

    Costs the memory of the float32 model, or as much disk (`gemini.model.disk`); worth it where the model
    runs many times in torch.
    """
    sites = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, PACKED)
    ]
    try:
        for parent, name, child in sites:
            setattr(parent, name, dense(child))
        yield
    finally:
        for parent, name, child in sites:
            setattr(parent, name, child)


def dense(layer: nn.Module) -> nn.Module:
    """A float32 layer with the dequantized weight of a packed one; any other as it is."""
    if isinstance(layer, PackedStack):
        return PackedStack(dense(layer.layer), layer.experts)
    if not isinstance(layer, PACKED):
        return layer
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(kept(layer.dequantized()), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias, requires_grad=False)
    return plain.eval()
