"""From a float weight and a format to the module that holds it packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemini.compress.gptq import gptq, ordered_factor, refit_scales
from gemini.compress.modules import (
    NF4,
    Bnb4Linear,
    ChannelwiseConv,
    ChannelwiseLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    SplitEmbedding,
    SplitLinear,
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
class Split:
    """A table of tokens whose first rows, a ``share`` of all, have one format and the rest another.

    Tokenizers that merge pairs number tokens by how often they were met: the first rows are most of what is
    looked up and, in a head, of what is predicted.
    """

    share: float
    first: Integers
    rest: Integers

    @property
    def bits(self) -> int:
        """Those of most rows."""
        return self.rest.bits

    @property
    def block_size(self) -> int:
        """That of most rows."""
        return self.rest.block_size

    def parts(self, rows: int) -> list[tuple[slice, Integers]]:
        """Which of ``rows`` rows have which format; kernels like a multiple of 16."""
        end = min(rows, 16 * max(1, round(self.share * rows / 16)))
        found = [(slice(0, end), self.first), (slice(end, rows), self.rest)]
        return [(span, form) for span, form in found if span.start < span.stop]


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


def make_head(
    weight: Tensor,
    bias: Tensor | None,
    form: Integers | Split,
    hessian: Tensor | None = None,
    table: QuantizedEmbedding | SplitEmbedding | None = None,
) -> nn.Module:
    """The packed head for a float one (V, D), rounded by GPTQ where there is a ``hessian`` of its inputs, or
    over the buffers of a ``table`` of the same format."""
    if isinstance(form, Split):
        tables = table.parts if isinstance(table, SplitEmbedding) else [None, None]
        return SplitLinear(
            make_head(weight[span], None if bias is None else bias[span], each, hessian, own)
            for (span, each), own in zip(form.parts(len(weight)), tables, strict=False)
        )
    assert not isinstance(table, SplitEmbedding)
    made: QuantizedEmbedding | Quantized | None = table
    if made is None and hessian is not None and form.bits == 4:
        made = rounded(weight, hessian, form)
    return make_linear(weight, bias, form, made=made)


def make_table(
    weight: Tensor,
    form: Integers | Split,
    scale_by: float | None,
    hessian: Tensor | None = None,
) -> QuantizedEmbedding | SplitEmbedding:
    """The packed token embedding for a float table (V, D).

    With ``hessian``, E[x x^T] of what a tied head reads, GPTQ rounds for the head and, by a share of the
    identity, for the rows that are looked up.
    """
    rows, columns = weight.shape
    if isinstance(form, Split):
        return SplitEmbedding(
            make_table(weight[span], each, scale_by, hessian) for span, each in form.parts(rows)
        )
    if hessian is None or form.bits == 8:
        made = quantized(weight, form)
    else:
        lookups = LOOKUPS * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
        made = rounded(weight, hessian + lookups, form)
    return QuantizedEmbedding(
        rows, columns, form.bits, form.block_size, made.qweight, made.scales, made.zero_points, scale_by
    )


def make_copy(
    table: QuantizedEmbedding | SplitEmbedding, scale_by: float | None
) -> QuantizedEmbedding | SplitEmbedding:
    """Another embedding over the buffers of ``table``."""
    if isinstance(table, SplitEmbedding):
        return SplitEmbedding(make_copy(part, scale_by) for part in table.parts)
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
    """What GPTQ makes of a float weight (N, K), by E[x x^T] of its inputs, with scales to suit its codes.

    4 bits in two rounds, the second with the scales that suit what the first chose; 8 bits leave too little.
    """
    made, factor = None, ordered_factor(hessian)
    for _ in range(2 if form.bits == 4 else 1):
        made = gptq(
            weight,
            hessian,
            bits=form.bits,
            block_size=form.block_size,
            symmetric=form.symmetric,
            fit=form.fit,
            like=made,
            factor=factor,
        )
        made = refit_scales(weight, hessian, made)
    assert made is not None
    return made
