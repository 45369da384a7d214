"""Quantized token embeddings: GatherBlockQuantized reads only the rows of the tokens at hand."""

from __future__ import annotations

import torch
from torch import nn

from gemini.compress.modules import QuantizedEmbedding
from gemini.export.twins.operators import CONTRIB, emit


class EmbeddingTwin(nn.Module):
    """GatherBlockQuantized over a (vocabulary, dim * bits / 8) uint8 table, the same bytes as a tied
    head's."""

    def __init__(self, table: QuantizedEmbedding) -> None:
        super().__init__()
        self.register_buffer("data", table.qweight.reshape(table.num_embeddings, -1))
        self.register_buffer("scales", table.scales)
        self.register_buffer("zero_points", table.zero_points)
        self.num_embeddings, self.dim = table.num_embeddings, table.embedding_dim
        # The operator knows whole blocks only: rows come out padded to a multiple of the block.
        self.width = table.scales.shape[1] * table.block_size
        self.scale_by = table.scale_by
        self.attributes = {
            "bits": table.bits,
            "block_size": table.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        inputs = (self.data, ids, self.scales, self.zero_points)
        rows = emit(f"{CONTRIB}::GatherBlockQuantized", inputs, self.attributes, (*ids.shape, self.width))
        if self.width != self.dim:
            rows = rows[..., : self.dim]
        return rows if self.scale_by is None else rows * self.scale_by


def as_embedding(module: nn.Module) -> EmbeddingTwin | None:
    """The twin of a quantized embedding; None for anything else (a float32 table traces to Gather)."""
    return EmbeddingTwin(module) if isinstance(module, QuantizedEmbedding) else None
