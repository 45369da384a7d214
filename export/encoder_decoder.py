"""The graphs of an encoder-decoder: the encoder once a request, the decoder once a token.

    vision    pixel_values -> image_features               (only for models that read images beside text)
    encoder   input_ids, attention_mask [, image_features] -> cross_mask, cross.{i}.key, cross.{i}.value
    decoder   input_ids, lengths, cross_mask, past, cross -> logits, present

What the decoder needs of the encoder are the keys and values of its cross attention, so those are what the
encoder's graph returns; they are computed once, by projections that the decoder's graph no longer holds. To
find them, the encoder's trace runs one step of the decoder with a cache that records; the rest of that step
is dead code, which the clean-up after tracing removes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from gemini.errors import ExportError
from gemini.export.graphs import Graph
from gemini.export.trace_state import TraceState
from gemini.export.twins.cache import CrossCache, GraphCache, GraphEncoderDecoderCache, Pair
from gemini.export.twins.head import gather_positions
from gemini.model.checkpoint import Checkpoint
from gemini.model.vision import pixel_shape, sample_pixels
from gemini.runtime.schema import LayerShape

Source = dict[str, torch.Tensor]


def reads_images_beside_text(model: Any) -> bool:
    """Whether the encoder takes ``image_features``, which ``get_image_features`` makes of pixels alone."""
    splits = callable(getattr(model, "get_image_features", None))
    return splits and "image_features" in inspect.signature(model.get_encoder().forward).parameters


def reads_text(model: Any) -> bool:
    """Whether the encoder reads token ids; if not, it reads pixels and nothing else."""
    return "input_ids" in inspect.signature(model.get_encoder().forward).parameters


def sample_source(checkpoint: Checkpoint, batch: int = 2, length: int = 7, images: bool = True) -> Source:
    """What the encoder's graph reads: valid token ids, their mask, and image vectors of random pixels.

    ``images=False`` gives image vectors (batch, 0, D), which is how a request without an image looks.
    """
    model = checkpoint.model
    if not reads_text(model):
        return {"pixel_values": sample_pixels(model, batch)}
    ids = sample_ids(model, batch, length)
    source = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if reads_images_beside_text(model):
        with torch.no_grad():
            features = image_features(model, sample_pixels(model, batch))
        source["image_features"] = features if images else features[:, :0]
    return source


def sample_ids(model: Any, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids int64 (batch, length) from the upper half of the vocabulary, beyond special tokens."""
    vocabulary = decoder_vocabulary(model)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary // 2, vocabulary, (batch, length), generator=generator)


def decoder_vocabulary(model: Any) -> int:
    """How many tokens the decoder chooses among."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def image_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """float32 (B, N, D), whether the model returns a tensor or an output object."""
    features = model.get_image_features(pixel_values)
    return features if isinstance(features, torch.Tensor) else features[0]


def encode(model: Any, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoder's vectors (B, S, D) and which of them the decoder may see, int64 (B, S).

    Vectors beyond the mask stand in front of the text and belong to the image; they are never padding.
    """
    hidden = model.get_encoder()(**source)[0]
    mask = source.get("attention_mask")
    if mask is None:
        return hidden, torch.ones(hidden.shape[:2], dtype=torch.int64)
    if "image_features" in source:
        mask = torch.cat([torch.ones(source["image_features"].shape[:2], dtype=torch.int64), mask], 1)
    return hidden, mask


def decode(model: Any, hidden: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor, cache: Any = None) -> Any:
    """Logits (B, T, V) of the decoder over vectors that are already encoded."""
    kwargs: dict[str, Any] = {"past_key_values": cache, "use_cache": True} if cache is not None else {}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        kwargs["attention_mask"] = mask
    outputs = BaseModelOutput(last_hidden_state=hidden)
    return model(encoder_outputs=outputs, decoder_input_ids=ids, **kwargs).logits


def cache_shapes(checkpoint: Checkpoint) -> tuple[list[LayerShape], list[LayerShape]]:
    """(own, cross): measured on the caches that a real forward fills, not read from the configuration."""
    model = checkpoint.model
    with torch.no_grad():
        hidden, mask = encode(model, sample_source(checkpoint, batch=1, length=2))
        own, cross = DynamicCache(), DynamicCache()
        decode(model, hidden, mask, sample_ids(model, 1, 2), EncoderDecoderCache(own, cross))
    shapes = []
    for cache in (own, cross):
        layers = getattr(cache, "layers", None)
        if not layers or not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
            raise ExportError(
                f"{type(model).__name__} keeps no cache of keys and values for its decoder.",
                "Only decoders with attention caches can be exported.",
            )
        shapes.append([LayerShape(k.keys.shape[1], k.keys.shape[3], k.values.shape[3]) for k in layers])
    return shapes[0], shapes[1]


class ImageSide(nn.Module):
    """Pixels to image vectors: everything that depends on the image alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return image_features(self.model, pixel_values)


class EncoderSide(nn.Module):
    """The encoder and, of every decoder layer, the projections of its output to keys and values."""

    def __init__(self, model: nn.Module, state: TraceState, names: list[str]) -> None:
        super().__init__()
        self.model, self.state, self.names = model, state, names

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, list[Pair]]:
        state, cross = self.state, CrossCache()
        state.cache = state.cross = state.logit_positions = None
        hidden, mask = encode(self.model, dict(zip(self.names, inputs, strict=True)))
        start = torch.zeros(hidden.shape[0], 1, dtype=torch.int64)
        decode(self.model, hidden, mask, start, GraphEncoderDecoderCache(DynamicCache(), cross))
        return mask.to(torch.int32), [cross.recorded[i] for i in sorted(cross.recorded)]


class DecoderSide(nn.Module):
    """One call of the decoder. All rows of a batch have equally many tokens; the source may be padded."""

    def __init__(self, model: nn.Module, state: TraceState, head_picks: bool, width: int) -> None:
        super().__init__()
        self.model, self.state, self.head_picks, self.width = model, state, head_picks, width

    def forward(
        self,
        input_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        logit_positions: torch.Tensor,
        cross_mask: torch.Tensor,
        past: list[Pair],
        cross: list[Pair],
    ) -> tuple[torch.Tensor, list[Pair | None]]:
        state = self.state
        shared = state.form.shared_cache
        state.cross = CrossCache(cross)
        state.cache = GraphCache(
            past,
            shared=shared,
            seqlens=seqlens_k,
            total=total_sequence_length,
            position=total_sequence_length.to(torch.int64) - input_ids.shape[1] if shared else None,
        )
        state.logit_positions = logit_positions if self.head_picks else None
        # Cross attention reads the cache; of the encoder's vectors the model only looks at the shape.
        hidden = torch.zeros(*cross_mask.shape, self.width)
        both = GraphEncoderDecoderCache(state.cache, state.cross)
        logits = decode(self.model, hidden, cross_mask, input_ids, both)
        if not self.head_picks:
            logits = gather_positions(logits, logit_positions)
        return logits, state.cache.present


def all_graphs(
    checkpoint: Checkpoint,
    state: TraceState,
    own: list[LayerShape],
    cross: list[LayerShape],
    head_picks: bool,
) -> list[Graph]:
    """The two or three graphs of the model, in the order in which a request passes them."""
    graphs = [
        encoder_graph(checkpoint, state, cross),
        decoder_graph(checkpoint, state, own, cross, head_picks),
    ]
    return [image_graph(checkpoint), *graphs] if reads_images_beside_text(checkpoint.model) else graphs


def source_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the runtime has to know about the encoder's side."""
    model = checkpoint.model
    source = sample_source(checkpoint)
    image = None
    if reads_images_beside_text(model) or not reads_text(model):
        image = dict(zip(("channels", "height", "width"), pixel_shape(model), strict=True))
    if image is not None and "image_features" in source:
        _, image["vectors"], image["dim"] = source["image_features"].shape
    return {
        "inputs": list(source),
        "vocab_size": model.get_input_embeddings().num_embeddings if reads_text(model) else None,
        "image": image,
        "pad_token_id": model.config.get_text_config(decoder=True).pad_token_id,
    }


def image_graph(checkpoint: Checkpoint) -> Graph:
    """pixel_values -> image_features."""
    pixels = {"pixel_values": sample_pixels(checkpoint.model)}
    module = ImageSide(checkpoint.model).eval()
    return Graph("vision", module, pixels, ({0: Dim("batch")},), ["pixel_values"], ["image_features"])


def encoder_graph(checkpoint: Checkpoint, state: TraceState, cross: list[LayerShape]) -> Graph:
    """The encoder's inputs -> cross_mask, cross keys and values."""
    inputs = sample_source(checkpoint)
    if "image_features" in inputs and inputs["image_features"].shape[1] == 1:
        # Tracing takes an axis of length 1 for a constant, and without an image there are none.
        inputs["image_features"] = inputs["image_features"].repeat(1, 2, 1)
    batch, sequence, images = Dim("batch"), Dim("sequence"), Dim("images")
    axes: dict[str, dict[int, Any]] = {
        "input_ids": {0: batch, 1: sequence},
        "attention_mask": {0: batch, 1: sequence},
        "image_features": {0: batch, 1: images},
        "pixel_values": {0: batch},
    }
    names = list(inputs)
    return Graph(
        "encoder",
        EncoderSide(checkpoint.model, state, names).eval(),
        inputs,
        (tuple(axes[name] for name in names),),
        names,
        ["cross_mask", *_names("cross", cross)],
    )


def decoder_graph(
    checkpoint: Checkpoint,
    state: TraceState,
    own: list[LayerShape],
    cross: list[LayerShape],
    head_picks: bool,
) -> Graph:
    """The inputs of a causal language model's graph, cross_mask and cross -> logits, present."""
    model = checkpoint.model
    batch, length, past, source = 2, 3, 5, 7
    with torch.no_grad():
        width = encode(model, sample_source(checkpoint))[0].shape[2]
    inputs = {
        "input_ids": sample_ids(model, batch, length),
        "seqlens_k": torch.full((batch,), past + length - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor(past + length, dtype=torch.int32),
        "logit_positions": torch.tensor([[0, 2]] * batch),
        "cross_mask": torch.ones(batch, source, dtype=torch.int32),
        "past": _zeros(own, batch, past),
        "cross": _zeros(cross, batch, source),
    }
    b, s, p, n, m = (Dim(name) for name in ("batch", "sequence", "past", "positions", "source"))
    shapes: tuple[Any, ...] = (
        {0: b, 1: s},
        {0: b},
        {},
        {0: b, 1: n},
        {0: b, 1: m},
        [({0: b, 2: p}, {0: b, 2: p}) for _ in own],
        [({0: b, 2: m}, {0: b, 2: m}) for _ in cross],
    )
    return Graph(
        "decoder",
        DecoderSide(model, state, head_picks, width).eval(),
        inputs,
        shapes,
        [*list(inputs)[:5], *_names("past", own), *_names("cross", cross)],
        ["logits", *_names("present", own)],
    )


def _zeros(layers: list[LayerShape], batch: int, length: int) -> list[Pair]:
    return [
        (
            torch.zeros(batch, s.kv_heads, length, s.key_dim),
            torch.zeros(batch, s.kv_heads, length, s.value_dim),
        )
        for s in layers
    ]


def _names(prefix: str, layers: list[LayerShape]) -> list[str]:
    return [f"{prefix}.{i}.{part}" for i in range(len(layers)) for part in ("key", "value")]
