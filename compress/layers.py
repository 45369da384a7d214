"""From a float weight and a format to the module that holds it packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemini.compress.gptq import gptq, refit_scales
from gemini.compress.modules import (
    NF4,
    Bnb4Linear,
    ChannelwiseConv,
    ChannelwiseLinear,
    QuantizedEmbedding,
    QuantizedLinear,
)
from gemini.compress.quantize import Quantized, quantize, quantize_bnb4, quantize_channels
from gemini.compress.ranges import Codes

# What look-ups count beside products in a tied table. SmolLM2-135M, 4 bits in blocks of 32, divergence on
# prose / documentation: 0.0316 / 0.0255 nats with 0, 0.0276 / 0.0240 with 0.3; without GPTQ 0.0475 / 0.0314.
LOOKUPS = 0.3


@dataclass(frozen=True)
class Integers:
    """Integer codes in blocks; see ``quantize.quantize``."""

    bits: int
    block_size: int
    symmetric: bool = True
    fit: str = "nearest"


@dataclass(frozen=True)
class Channels:
    """int8 codes with one scale per output channel."""


@dataclass(frozen=True)
class Bnb4:
    """bitsandbytes NF4 codes over the flattened weight."""

    block_size: int


def make_linear(
    weight: Tensor,
    bias: Tensor | None,
    form: Integers | Channels | Bnb4,
    importance: Tensor | None = None,
    made: QuantizedEmbedding | Quantized | None = None,
    divisor: Tensor | None = None,
    input_codes: Codes | None = None,
) -> nn.Module:
    """The packed layer for a float weight (N, K), or with ``made`` over buffers that there are already.

    With a format per channel the inputs are divided by ``divisor`` (K,) and, with ``input_codes``, then
    rounded to those.
    """
    rows, columns = weight.shape
    kept = None if bias is None else bias.detach().clone()
    if isinstance(form, Channels):
        scaled = weight if divisor is None else weight * divisor
        return ChannelwiseLinear(*quantize_channels(scaled), kept, divisor, input_codes)
    if isinstance(form, Bnb4):
        packed, absmax = quantize_bnb4(weight, form.block_size)
        return Bnb4Linear(columns, rows, packed, absmax, form.block_size, NF4, kept)
    source = quantized(weight, form, importance) if made is None else made
    return QuantizedLinear(
        columns, rows, form.bits, form.block_size, source.qweight, source.scales, source.zero_points, kept
    )


def make_table(
    weight: Tensor,
    form: Integers,
    scale_by: float | None,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
) -> QuantizedEmbedding:
    """The packed token embedding for a float table (V, D); ``importance`` (D,) as a tied head has it.

    With ``hessian``, E[x x^T] of what a tied head reads, GPTQ rounds for the head and, by a share of the
    identity, for the rows that are looked up.
    """
    rows, columns = weight.shape
    if hessian is None:
        made = quantized(weight, form, importance)
    else:
        lookups = LOOKUPS * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
        made = rounded(weight, hessian + lookups, form)
    return QuantizedEmbedding(
        rows, columns, form.bits, form.block_size, made.qweight, made.scales, made.zero_points, scale_by
    )


def make_copy(table: QuantizedEmbedding, scale_by: float | None) -> QuantizedEmbedding:
    """Another embedding over the buffers of ``table``."""
    buffers = (table.qweight, table.scales, table.zero_points)
    shape = (table.num_embeddings, table.embedding_dim, table.bits, table.block_size)
    return QuantizedEmbedding(*shape, *buffers, scale_by)


def make_conv(layer: nn.Conv2d, ends: tuple[Codes, Codes] | None = None) -> ChannelwiseConv:
    """The packed convolution for a float one; ``ends`` are the codes of its input and its output."""
    weight = layer.weight.detach()
    codes, scales = quantize_channels(weight.flatten(1))
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return ChannelwiseConv(layer, codes.reshape(weight.shape), scales, bias, ends)


def quantized(weight: Tensor, form: Integers, importance: Tensor | None = None) -> Quantized:
    """The codes of a float weight (N, K) in a format; ``importance`` (K,) weighs the fit."""
    return quantize(
        weight,
        bits=form.bits,
        block_size=form.block_size,
        symmetric=form.symmetric,
        fit=form.fit,
        importance=importance,
    )


def rounded(weight: Tensor, hessian: Tensor, form: Integers) -> Quantized:
    """What GPTQ makes of a float weight (N, K), by E[x x^T] of its inputs, with scales to suit its codes."""
    made = gptq(
        weight,
        hessian,
        bits=form.bits,
        block_size=form.block_size,
        symmetric=form.symmetric,
        fit=form.fit,
    )
    return refit_scales(weight, hessian, made)
