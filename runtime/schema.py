"""What a manifest says, as frozen dataclasses; :mod:`gemini.runtime.manifest` parses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 1
FAMILY_OF_TASK = {
    "text-generation": "decoder",
    "text-classification": "encoder",
    "feature-extraction": "encoder",
    "image-classification": "vision",
    "text2text-generation": "encoder-decoder",
    "image-to-text": "encoder-decoder",
}
# The graphs that a family cannot do without.
GRAPHS_OF_FAMILY = {
    "decoder": ("decoder",),
    "encoder": ("encoder",),
    "vision": ("vision",),
    "encoder-decoder": ("encoder", "decoder"),
}


@dataclass(frozen=True)
class FileEntry:
    """What a bundle file must hash to (lower-case hexadecimal sha256) and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class LayerShape:
    """The key/value cache of one decoder layer: keys (B, kv_heads, T, key_dim), values (…, value_dim)."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class DecoderModel:
    """A causal language model."""

    vocab_size: int
    context_length: int
    layers: tuple[LayerShape, ...]
    cache: str  # "shared": past and present are one buffer; "concat": present = past + new


@dataclass(frozen=True)
class EncoderModel:
    """A text encoder; ``labels`` and ``problem`` are those of a classifier."""

    vocab_size: int
    context_length: int
    inputs: tuple[str, ...]
    labels: tuple[str, ...] | None
    problem: str | None
    embedding_dim: int | None
    pad_token_id: int | None


@dataclass(frozen=True)
class VisionModel:
    """An image classifier; sizes in pixels."""

    labels: tuple[str, ...]
    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class ImageInput:
    """The pixels that a generator takes; ``vectors`` (N) and ``dim`` (D) of the image_features made of them.

    Both are None where the encoder reads the pixels themselves.
    """

    height: int
    width: int
    channels: int
    vectors: int | None
    dim: int | None


@dataclass(frozen=True)
class EncoderDecoderModel:
    """A generator with an encoder; ``vocab_size`` and ``context_length`` are those of the source.

    ``cross``: the keys and values of the encoder's vectors, a layer of the decoder each.
    """

    vocab_size: int | None
    context_length: int
    inputs: tuple[str, ...]
    decoder: DecoderModel
    cross: tuple[LayerShape, ...]
    image: ImageInput | None
    pad_token_id: int | None


@dataclass(frozen=True)
class GenerationInfo:
    """Special tokens, and the generation options its authors recommend.

    Of an encoder-decoder also: the tokens every answer begins with, those that are never chosen, and the
    text that starts a task, such as "translate English to German: ", by the task's name. If it classifies,
    the token that stands for each label, and how many tokens of a text it reads (None: what the encoder can).
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    decoder_start_ids: tuple[int, ...] = ()
    suppressed_ids: tuple[int, ...] = ()
    prefixes: Mapping[str, str] = field(default_factory=dict)
    label_ids: Mapping[str, int] = field(default_factory=dict)
    longest_classified: int | None = None


@dataclass(frozen=True)
class Manifest:
    """The parsed manifest; ``raw`` keeps the whole document for reports and ``inspect``."""

    name: str
    task: str
    family: str
    digest: str
    graphs: Mapping[str, str]
    half_graphs: Mapping[str, str]  # the same in float16 for a GPU; empty where there are none
    fused_graphs: Mapping[str, str]  # those that the runtime's own kernels have a form of
    packed_graphs: Mapping[str, Mapping[str, str]]  # the same with weights packed for them, by layout
    files: Mapping[str, FileEntry]
    model: DecoderModel | EncoderModel | VisionModel | EncoderDecoderModel
    generation: GenerationInfo
    requires_onnxruntime: str
    raw: Mapping[str, Any] = field(repr=False)
    schema_version: int = SCHEMA_VERSION
