"""manifest.json: the typed record that describes a bundle, its strict parser and its seal.

Every byte of the file is covered by its own ``digest``: the sha256 of the file with the digest's 64
hexadecimal digits replaced by zeros. :func:`seal` writes such a file, :func:`parse_manifest` refuses
anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from gemini.errors import BundleError
from gemini.runtime.fields import Fields, damaged
from gemini.runtime.schema import (
    FAMILY_OF_TASK,
    GRAPHS_OF_FAMILY,
    SCHEMA_VERSION,
    DecoderModel,
    EncoderDecoderModel,
    EncoderModel,
    FileEntry,
    GenerationInfo,
    ImageInput,
    LayerShape,
    Manifest,
    VisionModel,
)

MAX_MANIFEST_BYTES = 32 << 20
_ZEROS = "0" * 64
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256(data: bytes) -> str:
    """The sha256 of ``data`` as 64 hexadecimal digits."""
    import hashlib  # its crypto library takes long to load, and importing the runtime should not

    return hashlib.sha256(data).hexdigest()


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of manifest.json for ``manifest``, with its ``digest`` computed. BundleError if not JSON."""
    try:
        text = json.dumps(
            {**manifest, "digest": f"sha256:{_ZEROS}"}, indent=2, sort_keys=True, allow_nan=False
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise BundleError(
            f"The manifest cannot be written as JSON ({error}).", "Keep plain finite values in it."
        ) from error
    data = (text + "\n").encode("ascii")
    slot = f'"digest": "sha256:{_ZEROS}"'.encode()
    if data.count(slot) != 1:
        raise BundleError("The manifest holds a second empty digest.", "Leave the key 'digest' to seal().")
    return data.replace(slot, f'"digest": "sha256:{sha256(data)}"'.encode())


def parse_manifest(data: bytes) -> Manifest:
    """Parse and check the bytes of manifest.json; anything unexpected is a BundleError."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise damaged(f"manifest.json is larger than {MAX_MANIFEST_BYTES} bytes")
    root = Fields(_parse_json(data), "manifest.json")
    version = root.integer("schema_version", 0)
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"The bundle has schema version {version}; this release reads version {SCHEMA_VERSION}.",
            "Upgrade gemini-edge (pip install -U gemini-edge) or compress the model again.",
        )
    digest = root.text("digest")
    _check_digest(data, digest)
    task = root.one_of("task", tuple(FAMILY_OF_TASK))
    family = root.one_of("family", (FAMILY_OF_TASK[task],))
    files = {name: _file_entry(root.section("files"), name) for name in root.section("files").names()}
    graphs = _texts(root.section("graphs"))
    for name in GRAPHS_OF_FAMILY[family]:
        if name not in graphs:
            raise damaged(f"manifest.json names no graph '{name}'")
    halves = _texts(root.section("half_graphs")) if "half_graphs" in root.values else {}
    if halves and set(halves) != set(graphs):
        raise damaged("manifest.json names other graphs in half precision than in float32")
    fused = _texts(root.section("fused_graphs")) if "fused_graphs" in root.values else {}
    if not set(fused) <= set(graphs):
        raise damaged("manifest.json names fused graphs of graphs that it does not name")
    packed = _packed_graphs(root)
    if not all(set(own) <= set(fused) for own in packed.values()):
        raise damaged("manifest.json names packed graphs of graphs that have no fused one")
    packed_names = [name for own in packed.values() for name in own.values()]
    for name in (*graphs.values(), *halves.values(), *fused.values(), *packed_names):
        if name not in files:
            raise damaged(f"the graph {name!r} is not listed in 'files'")
    return Manifest(
        name=root.text("name"),
        task=task,
        family=family,
        digest=digest,
        graphs=graphs,
        half_graphs=halves,
        fused_graphs=fused,
        packed_graphs=packed,
        files=files,
        model=_MODELS[family](root.section("model")),
        generation=_generation(root),
        requires_onnxruntime=root.section("requirements").text("onnxruntime"),
        raw=root.values,
    )


def _texts(section: Fields) -> dict[str, str]:
    return {name: section.text(name) for name in section.names()}


def _packed_graphs(root: Fields) -> dict[str, dict[str, str]]:
    if not root.has("packed_graphs"):
        return {}
    layouts = root.section("packed_graphs")
    return {layout: _texts(layouts.section(layout)) for layout in layouts.names()}


def _parse_json(data: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise damaged(f"manifest.json is not valid JSON ({error})") from error


def _check_digest(data: bytes, digest: str) -> None:
    match = _DIGEST.fullmatch(digest)
    slot = f'"digest": "{digest}"'.encode("utf-8", "replace")
    if match is None or data.count(slot) != 1:
        raise damaged("manifest.json has no usable digest")
    zeroed = data.replace(slot, f'"digest": "sha256:{_ZEROS}"'.encode())
    if sha256(zeroed) != match.group(1):
        raise damaged("manifest.json does not match its digest")


def _file_entry(files: Fields, name: str) -> FileEntry:
    entry = files.section(name)
    sha256 = entry.text("sha256")
    if _SHA256.fullmatch(sha256) is None:
        raise damaged(f"the sha256 of {name!r} is not 64 hexadecimal digits")
    return FileEntry(sha256, entry.integer("size", 0, 1 << 50))


def _layers(model: Fields, name: str) -> tuple[LayerShape, ...]:
    return tuple(
        LayerShape(layer.integer("kv_heads", 1), layer.integer("key_dim", 1), layer.integer("value_dim", 1))
        for layer in model.sections(name)
    )


def _decoder(model: Fields) -> DecoderModel:
    return DecoderModel(
        model.integer("vocab_size", 1),
        model.integer("context_length", 1),
        _layers(model, "layers"),
        model.one_of("cache", ("shared", "concat")),
    )


# What an encoder-decoder may read: text, text beside image vectors, pixels alone.
_SOURCES = (
    {"input_ids", "attention_mask"},
    {"input_ids", "attention_mask", "image_features"},
    {"pixel_values"},
)


def _encoder_decoder(model: Fields) -> EncoderDecoderModel:
    inputs = model.texts("inputs")
    if set(inputs) not in _SOURCES:
        raise damaged(f"manifest.json: the encoder inputs {list(inputs)} are unknown")
    image = _image_input(model.section("image")) if model.has("image") else None
    vocabulary = model.optional_integer("vocab_size", 1)
    if (vocabulary is None) != ("input_ids" not in inputs) or (image is None) != (len(inputs) == 2):
        raise damaged(f"manifest.json: vocab_size and image do not fit the encoder inputs {list(inputs)}")
    if "image_features" in inputs and (image is None or image.vectors is None or image.dim is None):
        raise damaged("manifest.json states no size of the image vectors")
    return EncoderDecoderModel(
        vocabulary,
        model.integer("context_length", 1),
        inputs,
        _decoder(model.section("decoder")),
        _layers(model, "cross"),
        image,
        model.optional_integer("pad_token_id", 0),
    )


def _image_input(image: Fields) -> ImageInput:
    return ImageInput(
        image.integer("height", 1, 1 << 15),
        image.integer("width", 1, 1 << 15),
        image.integer("channels", 1, 4),
        image.optional_integer("vectors", 1),
        image.optional_integer("dim", 1),
    )


def _encoder(model: Fields) -> EncoderModel:
    inputs = model.texts("inputs")
    if (
        not {"input_ids", "attention_mask"}
        <= set(inputs)
        <= {"input_ids", "attention_mask", "token_type_ids"}
    ):
        raise damaged(f"manifest.json: the encoder inputs {list(inputs)} are unknown")
    return EncoderModel(
        model.integer("vocab_size", 1),
        model.integer("context_length", 1),
        inputs,
        model.texts("labels") if model.has("labels") else None,
        model.one_of("problem", ("single_label", "multi_label", "regression"))
        if model.has("problem")
        else None,
        model.optional_integer("embedding_dim", 1),
        model.optional_integer("pad_token_id", 0),
    )


def _vision(model: Fields) -> VisionModel:
    image = model.section("image")
    return VisionModel(
        model.texts("labels"),
        image.integer("height", 1, 1 << 15),
        image.integer("width", 1, 1 << 15),
        image.integer("channels", 1, 4),
    )


def _generation(root: Fields) -> GenerationInfo:
    if not root.has("generation"):
        return GenerationInfo()
    info = root.section("generation")
    return GenerationInfo(
        info.integers("eos_token_ids", 0),
        info.optional_integer("bos_token_id", 0),
        info.optional_integer("pad_token_id", 0),
        info.section("defaults").values if info.has("defaults") else {},
        info.integers("decoder_start_ids", 0) if info.has("decoder_start_ids") else (),
        info.integers("suppressed_ids", 0) if info.has("suppressed_ids") else (),
        _texts_by_name(info.section("prefixes")) if info.has("prefixes") else {},
        _tokens_by_name(info.section("label_ids")) if info.has("label_ids") else {},
        info.optional_integer("longest_classified", 1),
    )


def _texts_by_name(fields: Fields) -> dict[str, str]:
    return {name: fields.text(name) for name in fields.names()}


def _tokens_by_name(fields: Fields) -> dict[str, int]:
    return {name: fields.integer(name, 0) for name in fields.names()}


_MODELS: Mapping[str, Callable[[Fields], DecoderModel | EncoderModel | VisionModel | EncoderDecoderModel]] = {
    "decoder": _decoder,
    "encoder": _encoder,
    "vision": _vision,
    "encoder-decoder": _encoder_decoder,
}
