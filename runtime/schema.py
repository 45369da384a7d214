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
class GenerationInfo:
    """Special tokens, and the generation options its authors recommend."""

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The parsed manifest; ``raw`` keeps the whole document for reports and ``inspect``."""

    name: str
    task: str
    family: str
    digest: str
    graphs: Mapping[str, str]
    files: Mapping[str, FileEntry]
    model: DecoderModel | EncoderModel | VisionModel
    generation: GenerationInfo
    requires_onnxruntime: str
    raw: Mapping[str, Any] = field(repr=False)
    schema_version: int = SCHEMA_VERSION
