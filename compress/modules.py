"""Torch modules that hold packed weights in the layout of the onnxruntime operator they export to.

    QuantizedLinear -> MatMulNBits          QuantizedEmbedding -> GatherBlockQuantized
    ChannelwiseLinear -> DynamicQuantizeMatMul          Bnb4Linear -> MatMulBnb4
    the same with fixed codes -> QuantizeLinear and MatMulIntegerToFloat
    ChannelwiseConv -> DequantizeLinear and Conv        with fixed codes -> QLinearConv
    SplitLinear, SplitEmbedding -> what their parts do

Their ``forward`` is the float reference of that operator: weights dequantized, activations untouched.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemini.compress.packing import unpack_4bit
from gemini.compress.ranges import Codes

# The codebooks of bitsandbytes: NF4 holds normal quantiles (QLoRA, arXiv 2305.14314, appendix E); FP4 is a
# 1-2-1 float scaled to [-1, 1]. The position in the tuple is the stored code; `quant_type` selects the row.
NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_HALF = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4_CODES = (*_FP4_HALF, *(-value for value in _FP4_HALF))
FP4, NF4 = 0, 1


def dequantize_blocks(
    qweight: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, block_size: int, columns: int
) -> Tensor:
    """``(q - zero_point) * scale`` of packed blocks, float32 (rows, columns).

    ``qweight`` uint8 (rows, blocks, block_size * bits // 8), ``scales`` float32 (rows, blocks),
    ``zero_points`` uint8 (rows, ceil(blocks * bits / 8)) or None for the middle code. Source: MatMulNBits
    operator spec.
    """
    rows, blocks = scales.shape
    codes = unpack_4bit(qweight, block_size) if bits == 4 else qweight
    if zero_points is None:
        offset = torch.full((1, 1, 1), float(1 << (bits - 1)))
    else:
        unpacked = unpack_4bit(zero_points, blocks) if bits == 4 else zero_points
        offset = unpacked.float().unsqueeze(-1)
    weight = (codes.float() - offset) * scales.unsqueeze(-1)
    return weight.reshape(rows, blocks * block_size)[:, :columns]


class QuantizedLinear(nn.Module):
    """A linear layer with 4- or 8-bit weights in blocks along the input features (MatMulNBits layout)."""

    qweight: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        block_size: int,
        qweight: Tensor,
        scales: Tensor,
        zero_points: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.block_size = bits, block_size
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", zero_points)
        self.register_buffer("bias", bias)

    def dequantized(self) -> Tensor:
        """The weight as float32 (out_features, in_features)."""
        return dequantize_blocks(
            self.qweight, self.scales, self.zero_points, self.bits, self.block_size, self.in_features
        )

    @property
    def weight(self) -> Tensor:
        """The float weight, for model code that reads ``layer.weight`` (its dtype, mostly)."""
        return self.dequantized()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return functional.linear(x, self.dequantized(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, block_size={self.block_size}"


class ChannelwiseLinear(nn.Module):
    """A linear layer with int8 weights and one scale per output channel (DynamicQuantizeMatMul).

    With a ``divisor`` the input is divided by it first, and the codes stand for the weight times it. With
    ``input_codes`` those of the input are fixed (after the division), else every call finds its own.
    """

    qweight: Tensor
    scales: Tensor
    bias: Tensor | None
    divisor: Tensor | None

    def __init__(
        self,
        qweight: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
        divisor: Tensor | None = None,
        input_codes: Codes | None = None,
    ) -> None:
        """``qweight`` int8 (out_features, in_features), ``scales`` float32 (out_features,), ``divisor``
        float32 (in_features,)."""
        super().__init__()
        self.input_codes = input_codes
        self.out_features, self.in_features = qweight.shape
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.register_buffer("divisor", divisor)

    def dequantized(self) -> Tensor:
        """The weight as float32 (out_features, in_features), for inputs that nothing has divided."""
        weight = self.qweight.float() * self.scales.unsqueeze(-1)
        return weight if self.divisor is None else weight / self.divisor

    @property
    def weight(self) -> Tensor:
        """The float weight, for model code that reads ``layer.weight`` (its dtype, mostly)."""
        return self.dequantized()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features); the operator also rounds ``x`` to 8 bits."""
        return functional.linear(x, self.dequantized(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int8 per channel"


class ChannelwiseConv(nn.Module):
    """A 2-D convolution with int8 weights and one scale per output channel.

    ``codes`` of its input and its output are fixed; without them activations stay float.
    """

    qweight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        layer: nn.Conv2d,
        qweight: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
        codes: tuple[Codes, Codes] | None = None,
    ) -> None:
        """``qweight`` int8 like the layer's weight (O, I / groups, kh, kw), ``scales`` float32 (O,)."""
        super().__init__()
        self.codes = codes
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    def dequantized(self) -> Tensor:
        """The weight as float32 (O, I / groups, kh, kw)."""
        return self.qweight.float() * self.scales[:, None, None, None]

    @property
    def weight(self) -> Tensor:
        """The float weight, for model code that reads ``layer.weight`` (its dtype, mostly)."""
        return self.dequantized()

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer over another spelling of its weight."""
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W')."""
        return self.convolve(x, self.dequantized())

    def extra_repr(self) -> str:
        return f"{tuple(self.qweight.shape)}, int8 per channel"


class Bnb4Linear(nn.Module):
    """A linear layer with bitsandbytes 4-bit codes over the flattened weight (MatMulBnb4)."""

    qweight: Tensor
    absmax: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        qweight: Tensor,
        absmax: Tensor,
        block_size: int,
        quant_type: int = NF4,
        bias: Tensor | None = None,
    ) -> None:
        """``qweight`` uint8 ((N*K + 1) // 2,), even element in the high nibble; ``absmax`` one per block."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.quant_type = block_size, quant_type
        self.register_buffer("qweight", qweight)
        self.register_buffer("absmax", absmax)
        self.register_buffer("bias", bias)

    def dequantized(self) -> Tensor:
        """The weight as float32 (out_features, in_features)."""
        count = self.in_features * self.out_features
        codes = torch.stack((self.qweight >> 4, self.qweight & 15), dim=-1).flatten()[:count]
        table = torch.tensor(NF4_CODES if self.quant_type == NF4 else FP4_CODES)
        scale = self.absmax.repeat_interleave(self.block_size)[:count]
        return (table[codes.long()] * scale).reshape(self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The float weight, for model code that reads ``layer.weight`` (its dtype, mostly)."""
        return self.dequantized()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return functional.linear(x, self.dequantized(), self.bias)

    def extra_repr(self) -> str:
        kind = "nf4" if self.quant_type == NF4 else "fp4"
        return f"{self.in_features}, {self.out_features}, {kind}, block_size={self.block_size}"


class QuantizedEmbedding(nn.Module):
    """An embedding table in quantized blocks; may share its buffers with the ``QuantizedLinear`` of a tied
    head.

    ``scale_by`` multiplies the looked-up rows, for tables whose original module does so.
    """

    qweight: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        block_size: int,
        qweight: Tensor,
        scales: Tensor,
        zero_points: Tensor | None = None,
        scale_by: float | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.bits, self.block_size, self.scale_by = bits, block_size, scale_by
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", zero_points)

    def dequantized(self) -> Tensor:
        """The table as float32 (num_embeddings, embedding_dim), without ``scale_by``."""
        return dequantize_blocks(
            self.qweight, self.scales, self.zero_points, self.bits, self.block_size, self.embedding_dim
        )

    @property
    def weight(self) -> Tensor:
        """The float table, for model code that reads ``embedding.weight`` (its dtype, mostly)."""
        return self.dequantized()

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (...,) -> float32 (..., embedding_dim); only the rows asked for are dequantized."""
        flat = ids.reshape(-1)
        zero_points = None if self.zero_points is None else self.zero_points[flat]
        rows = dequantize_blocks(
            self.qweight[flat], self.scales[flat], zero_points, self.bits, self.block_size, self.embedding_dim
        )
        rows = rows if self.scale_by is None else rows * self.scale_by
        return rows.reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, block_size={self.block_size}"


class _ByRows(nn.Module):
    """A weight whose rows are those of its parts, one part after the other."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def dequantized(self) -> Tensor:
        """The weight as float32 (rows, columns), without what the parts of a table multiply by."""
        return self.weight

    @property
    def weight(self) -> Tensor:
        """The float weight, for model code that reads ``layer.weight`` (its dtype, mostly)."""
        return torch.cat([part.weight for part in self.parts])


class SplitLinear(_ByRows):
    """A linear layer whose output features are those of its parts, one part after the other."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__(parts)
        self.in_features = self.parts[0].in_features
        self.out_features = sum(part.out_features for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return torch.cat([part(x) for part in self.parts], -1)


class SplitEmbedding(_ByRows):
    """A token embedding whose rows are those of its parts, one part after the other."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__(parts)
        self.sizes = [part.num_embeddings for part in self.parts]
        self.num_embeddings, self.embedding_dim = sum(self.sizes), self.parts[0].embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (...,) -> float32 (..., embedding_dim); every part looks up every token, its nearest row for
        those of other parts."""
        rows, start = None, 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            found = part((ids - start).clamp(0, size - 1))
            rows = found if rows is None else torch.where((ids < start).unsqueeze(-1), rows, found)
            start += size
        assert rows is not None
        return rows
