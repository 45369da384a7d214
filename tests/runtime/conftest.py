"""Tiny bundles, built here with onnx.helper and the tokenizers library, and their numpy references.

The decoder has two layers of GroupQueryAttention with rotary positions (so a token in a wrong cache slot
changes the logits); its reference is a plain float64 recomputation of every position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gemini.export.half_precision import half_precision
from gemini.runtime import seal
from gemini.runtime.providers import CUDA

WIDTH, HEADS, KV_HEADS, DIM, LAYERS, CONTEXT = 32, 4, 2, 16, 2, 160
BOS, EOS, PAD = 0, 1, 2
TEXT = [
    "the sea is grey and the wind is cold",
    "a small stone lay on the road — naïve café 你好 🙂",
    "one two",
]
CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CUDA in ort.get_available_providers():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs onnxruntime-gpu and a CUDA device"))


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE with <s>, </s>, <pad>; any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return tokenizer


@dataclass(frozen=True)
class Toy:
    """A bundle on disk, and the reference that recomputes all its logits (S, V) for one row of ids."""

    path: Path
    reference: Callable[[Any], np.ndarray]
    vocab_size: int


def write_bundle(folder: Path, fields: dict[str, Any], files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    listed = {name: {"sha256": hashlib.sha256(d).hexdigest(), "size": len(d)} for name, d in files.items()}
    document = {
        "schema_version": 1,
        "name": "toy",
        "files": listed,
        "requirements": {"onnxruntime": "1.20", "operators": [], "opsets": {}},
        **fields,
    }
    (folder / "manifest.json").write_bytes(seal(document))
    return folder


def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def serialize(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, np.ndarray]
) -> bytes:
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def decoder_ports(kv_heads: int, key_dim: int, value_dim: int, vocab: int) -> tuple[list[Any], list[Any]]:
    int64 = TensorProto.INT64
    inputs = [value("input_ids", ["batch", "sequence"], int64)]
    outputs = [value("logits", ["batch", "positions", vocab])]
    for layer in range(LAYERS):
        for kind, dim in (("key", key_dim), ("value", value_dim)):
            inputs.append(value(f"past.{layer}.{kind}", ["batch", kv_heads, "past", dim]))
            outputs.append(value(f"present.{layer}.{kind}", ["batch", kv_heads, "total", dim]))
    return [*inputs, value("logit_positions", ["batch", "positions"], int64)], outputs


def head_nodes(hidden: str) -> list[Any]:
    return [
        helper.make_node("Unsqueeze", ["logit_positions", "last_axis"], ["indices"]),
        helper.make_node("GatherND", [hidden, "indices"], ["wanted"], batch_dims=1),
        helper.make_node("MatMul", ["wanted", "head"], ["logits"]),
    ]


def random_weights(vocab: int, seed: int, layer_shapes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {"embedding": rng.normal(size=(vocab, WIDTH)), "head": rng.normal(size=(WIDTH, vocab)) / 3}
    for layer in range(LAYERS):
        for name, shape in layer_shapes.items():
            weights[f"{name}.{layer}"] = rng.normal(size=shape) / np.sqrt(shape[0]) * 1.5
    return {name: array.astype(np.float32) for name, array in weights.items()}


def shared_decoder(vocab: int) -> tuple[bytes, Callable[[Any], np.ndarray]]:
    packed = (HEADS + 2 * KV_HEADS) * DIM
    weights = random_weights(vocab, 1, {"qkv": (WIDTH, packed), "out": (HEADS * DIM, WIDTH)})
    angles = np.arange(CONTEXT)[:, None] / 10.0 ** np.arange(DIM // 2)[None]
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    nodes = [helper.make_node("Gather", ["embedding", "input_ids"], ["hidden.0"])]
    for i in range(LAYERS):
        attention = [f"projected.{i}", "", "", f"past.{i}.key", f"past.{i}.value"]
        nodes += [
            helper.make_node("MatMul", [f"hidden.{i}", f"qkv.{i}"], [f"projected.{i}"]),
            helper.make_node(
                "GroupQueryAttention",
                [*attention, "seqlens_k", "total_sequence_length", "cos", "sin"],
                [f"mixed.{i}", f"present.{i}.key", f"present.{i}.value"],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                do_rotary=1,
            ),
            helper.make_node("MatMul", [f"mixed.{i}", f"out.{i}"], [f"delta.{i}"]),
            helper.make_node("Add", [f"hidden.{i}", f"delta.{i}"], [f"hidden.{i + 1}"]),
        ]
    inputs, outputs = decoder_ports(KV_HEADS, DIM, DIM, vocab)
    int32 = TensorProto.INT32
    inputs += [value("seqlens_k", ["batch"], int32), value("total_sequence_length", [], int32)]
    constants = {"cos": cos, "sin": sin, "last_axis": np.array([2], np.int64)}
    data = serialize([*nodes, *head_nodes(f"hidden.{LAYERS}")], inputs, outputs, {**weights, **constants})

    def rotate(x: np.ndarray) -> np.ndarray:  # (S, H, D), halves as in RotaryEmbedding without interleaving
        first, second = x[..., : DIM // 2], x[..., DIM // 2 :]
        c, s = np.cos(angles)[: len(x), None], np.sin(angles)[: len(x), None]
        return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    def reference(ids: Any) -> np.ndarray:
        hidden = weights["embedding"][np.asarray(ids)].astype(np.float64)
        size = len(hidden)
        for i in range(LAYERS):
            heads = (hidden @ weights[f"qkv.{i}"]).reshape(size, HEADS + 2 * KV_HEADS, DIM)
            q, k, v = heads[:, :HEADS], heads[:, HEADS : HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS :]
            q, k = rotate(q), rotate(k).repeat(HEADS // KV_HEADS, axis=1)
            mixed = attend(q, k, v.repeat(HEADS // KV_HEADS, axis=1))
            hidden = hidden + mixed @ weights[f"out.{i}"]
        return hidden @ weights["head"]

    return data, reference


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention, position by position: (S, H, D) -> (S, H * Dv)."""
    rows = []
    for t in range(len(q)):
        scores = np.einsum("hd,shd->hs", q[t], k[: t + 1]) / np.sqrt(q.shape[-1])
        p = np.exp(scores - scores.max(-1, keepdims=True))
        rows.append(np.einsum("hs,shd->hd", p / p.sum(-1, keepdims=True), v[: t + 1]).reshape(-1))
    return np.stack(rows)


def concat_decoder(vocab: int) -> tuple[bytes, Callable[[Any], np.ndarray]]:
    """One head of plain operators, present = past + new, value_dim unlike key_dim, no length inputs."""
    key_dim, value_dim = 8, 12
    shapes = {
        "q": (WIDTH, key_dim),
        "k": (WIDTH, key_dim),
        "v": (WIDTH, value_dim),
        "out": (value_dim, WIDTH),
    }
    weights = random_weights(vocab, 2, shapes)
    nodes = [helper.make_node("Gather", ["embedding", "input_ids"], ["hidden.0"])]
    nodes += [
        helper.make_node("Shape", ["past.0.key"], ["past_length"], start=2, end=3),
        helper.make_node("Shape", ["input_ids"], ["new_length"], start=1, end=2),
        helper.make_node("Add", ["past_length", "new_length"], ["total_length"]),
        *(helper.make_node("Squeeze", [f"{n}_length"], [f"{n}_count"]) for n in ("past", "total")),
        helper.make_node("Range", ["past_count", "total_count", "one"], ["queries"]),
        helper.make_node("Range", ["zero", "total_count", "one"], ["keys"]),
        helper.make_node("Unsqueeze", ["queries", "second_axis"], ["query_column"]),
        helper.make_node("LessOrEqual", ["keys", "query_column"], ["allowed"]),
    ]
    for i in range(LAYERS):
        for n in "qkv":
            nodes += [
                helper.make_node("MatMul", [f"hidden.{i}", f"{n}.{i}"], [f"{n}_flat.{i}"]),
                helper.make_node("Unsqueeze", [f"{n}_flat.{i}", "second_axis"], [f"{n}_new.{i}"]),
            ]
        for n, kind in (("k", "key"), ("v", "value")):
            ports = [f"past.{i}.{kind}", f"{n}_new.{i}"]
            nodes.append(helper.make_node("Concat", ports, [f"present.{i}.{kind}"], axis=2))
        nodes += [
            helper.make_node("Transpose", [f"present.{i}.key"], [f"keys_t.{i}"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", [f"q_new.{i}", f"keys_t.{i}"], [f"raw.{i}"]),
            helper.make_node("Mul", [f"raw.{i}", "scale"], [f"scores.{i}"]),
            helper.make_node("Where", ["allowed", f"scores.{i}", "minus"], [f"masked.{i}"]),
            helper.make_node("Softmax", [f"masked.{i}"], [f"weights.{i}"], axis=-1),
            helper.make_node("MatMul", [f"weights.{i}", f"present.{i}.value"], [f"mixed4.{i}"]),
            helper.make_node("Squeeze", [f"mixed4.{i}", "second_axis"], [f"mixed.{i}"]),
            helper.make_node("MatMul", [f"mixed.{i}", f"out.{i}"], [f"delta.{i}"]),
            helper.make_node("Add", [f"hidden.{i}", f"delta.{i}"], [f"hidden.{i + 1}"]),
        ]
    constants = {
        "last_axis": np.array([2], np.int64),
        "second_axis": np.array([1], np.int64),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "scale": np.array(key_dim**-0.5, np.float32),
        "minus": np.array(-1e9, np.float32),
    }
    inputs, outputs = decoder_ports(1, key_dim, value_dim, vocab)
    data = serialize([*nodes, *head_nodes(f"hidden.{LAYERS}")], inputs, outputs, {**weights, **constants})

    def reference(ids: Any) -> np.ndarray:
        hidden = weights["embedding"][np.asarray(ids)].astype(np.float64)
        for i in range(LAYERS):
            q, k, v = ((hidden @ weights[f"{n}.{i}"])[:, None] for n in "qkv")
            hidden = hidden + attend(q, k, v) @ weights[f"out.{i}"]
        return hidden @ weights["head"]

    return data, reference


def make_decoder(folder: Path, cache: str, half: bool = False, **changes: Any) -> Toy:
    """``half``: with the graph for a GPU beside the other."""
    tokenizer = byte_level_tokenizer()
    vocab = tokenizer.get_vocab_size()
    data, reference = shared_decoder(vocab) if cache == "shared" else concat_decoder(vocab)
    shape = (KV_HEADS, DIM, DIM) if cache == "shared" else (1, 8, 12)
    layer = dict(zip(("kv_heads", "key_dim", "value_dim"), shape, strict=True))
    fields = {
        "task": "text-generation",
        "family": "decoder",
        "graphs": {"decoder": "decoder.onnx"},
        "model": {"vocab_size": vocab, "context_length": CONTEXT, "layers": [layer] * LAYERS, "cache": cache},
        "generation": {
            "eos_token_ids": [EOS],
            "bos_token_id": BOS,
            "pad_token_id": PAD,
            "defaults": {"do_sample": False},
        },
        **changes,
    }
    files = {
        "decoder.onnx": data,
        "tokenizer.json": tokenizer.to_str().encode(),
        "chat_template.jinja": CHAT.encode(),
        "report.json": b"{}\n",
    }
    if half:
        copy = half_precision(ir.from_proto(onnx.load_from_string(data)), folder)
        files["decoder.half.onnx"] = ir.to_proto(copy).SerializeToString()
        fields["half_graphs"] = {"decoder": "decoder.half.onnx"}
    return Toy(write_bundle(folder, fields, files), reference, vocab)


def make_encoder(folder: Path, task: str, **model: Any) -> Toy:
    """Mean over real tokens of word + type embeddings, then a matrix. The reference takes (ids, types)."""
    tokenizer = byte_level_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>", length=40)  # must not leak into the session
    tokenizer.enable_truncation(5)
    vocab = tokenizer.get_vocab_size()
    rng = np.random.default_rng(3)
    weights = {
        "words": rng.normal(size=(vocab, WIDTH)).astype(np.float32),
        "types": rng.normal(size=(2, WIDTH)).astype(np.float32),
        "head": rng.normal(size=(WIDTH, 3)).astype(np.float32),
    }
    output = "embedding" if task == "feature-extraction" else "logits"
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["word"]),
        helper.make_node("Gather", ["types", "token_type_ids"], ["type"]),
        helper.make_node("Add", ["word", "type"], ["hidden"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "axis2"], ["column"]),
        helper.make_node("Mul", ["hidden", "column"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "axis1"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["column", "axis1"], ["count"], keepdims=0),
        helper.make_node("Div", ["total", "count"], ["mean"]),
        helper.make_node("MatMul", ["mean", "head"], [output]),
    ]
    axes = {"axis1": np.array([1], np.int64), "axis2": np.array([2], np.int64)}
    names = ["input_ids", "attention_mask", "token_type_ids"]
    ports = [value(name, ["batch", "sequence"], TensorProto.INT64) for name in names]
    data = serialize(nodes, ports, [value(output, ["batch", 3])], {**weights, **axes})
    fields = {
        "task": task,
        "family": "encoder",
        "graphs": {"encoder": "encoder.onnx"},
        "model": {
            "vocab_size": vocab,
            "context_length": 24,
            "inputs": names,
            "labels": None if task == "feature-extraction" else ["bad", "fine", "good"],
            "problem": None,
            "embedding_dim": 3,
            **model,
        },
    }
    files = {"encoder.onnx": data, "tokenizer.json": tokenizer.to_str().encode()}

    def reference(ids: Any) -> np.ndarray:
        hidden = weights["words"][np.asarray(ids)] + weights["types"][0]
        return np.asarray(hidden.astype(np.float64).mean(0) @ weights["head"])

    return Toy(write_bundle(folder, fields, files), reference, vocab)


def make_vision(folder: Path, **steps: Any) -> Toy:
    """Mean of the pixels of each channel, then a matrix."""
    head = np.random.default_rng(4).normal(size=(3, 4)).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "head"], ["logits"]),
    ]
    ports = [value("pixel_values", ["batch", 3, 12, 16])], [value("logits", ["batch", 4])]
    data = serialize(nodes, *ports, {"head": head, "axes": np.array([2, 3], np.int64)})
    document = {
        "resize": {"height": 12, "width": 16},
        "resample": 2,
        "center_crop": None,
        "rescale": 1 / 255,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.5, 0.2, 0.3],
        "rgb": True,
        **steps,
    }
    fields = {
        "task": "image-classification",
        "family": "vision",
        "graphs": {"vision": "vision.onnx"},
        "model": {"labels": list("abcd"), "image": {"height": 12, "width": 16, "channels": 3}},
    }
    files = {"vision.onnx": data, "preprocessor.json": json.dumps(document).encode()}
    return Toy(write_bundle(folder, fields, files), lambda pixels: np.asarray(pixels.mean((2, 3)) @ head), 0)


def pair_graphs(vocab: int, images: bool) -> tuple[dict[str, bytes], Callable[..., np.ndarray]]:
    """An encoder-decoder of sums: logits = tanh(own tokens so far + everything of the source) @ head.

    Its reference takes the answer's ids, the source's ids and pixels or None; logits (T, V).
    """
    rng, width, int64 = np.random.default_rng(5), 4, TensorProto.INT64
    table, own = (rng.normal(size=(vocab, width)).astype(np.float32) / 2 for _ in range(2))
    head = rng.normal(size=(width, vocab)).astype(np.float32)
    one, second, third = (np.array(n, np.int64) for n in ([1], [1], [2]))
    pixels = [value("pixel_values", ["batch", 3, 2, 2])]
    vision = serialize(
        [helper.make_node("Reshape", ["pixel_values", "grid"], ["image_features"])],
        pixels,
        [value("image_features", ["batch", 3, width])],
        {"grid": np.array([0, 3, width], np.int64)},
    )
    texts = [value(name, ["batch", "sequence"], int64) for name in ("input_ids", "attention_mask")]
    ports = [value("image_features", ["batch", "images", width])] if images else []
    front = [
        helper.make_node("Shape", ["image_features"], ["shape"], start=0, end=2),
        helper.make_node("Expand", ["one", "shape"], ["visible"]),
        helper.make_node("Concat", ["image_features", "words"], ["vectors"], axis=1),
        helper.make_node("Concat", ["visible", "attention_mask"], ["whole_mask"], axis=1),
    ]
    alone = [
        helper.make_node("Identity", ["words"], ["vectors"]),
        helper.make_node("Identity", ["attention_mask"], ["whole_mask"]),
    ]
    cross = [value(f"cross.0.{part}", ["batch", 1, "source", width]) for part in ("key", "value")]
    mask = value("cross_mask", ["batch", "source"], TensorProto.INT32)
    encoder = serialize(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["words"]),
            *(front if images else alone),
            helper.make_node("Cast", ["whole_mask"], ["cross_mask"], to=TensorProto.INT32),
            helper.make_node("Unsqueeze", ["vectors", "second"], ["cross.0.key"]),
            helper.make_node("Neg", ["cross.0.key"], ["negative"]),
            helper.make_node("Sub", ["cross.0.key", "negative"], ["cross.0.value"]),
        ],
        [*texts, *ports],
        [mask, *cross],
        {"table": table, "one": one, "second": second},
    )
    past = [value(f"past.0.{part}", ["batch", 1, "past", width]) for part in ("key", "value")]
    present = [value(f"present.0.{part}", ["batch", 1, "total", width]) for part in ("key", "value")]
    positions = value("logit_positions", ["batch", "positions"], int64)
    decoder = serialize(
        [
            helper.make_node("Gather", ["own", "input_ids"], ["new"]),
            helper.make_node("Unsqueeze", ["new", "second"], ["rows"]),
            helper.make_node("Concat", ["past.0.key", "rows"], ["present.0.key"], axis=2),
            helper.make_node("Concat", ["past.0.value", "rows"], ["present.0.value"], axis=2),
            helper.make_node("ReduceSum", ["past.0.key", "third"], ["before"], keepdims=0),
            helper.make_node("CumSum", ["new", "axis"], ["running"]),
            helper.make_node("Add", ["before", "running"], ["said"]),
            helper.make_node("Cast", ["cross_mask"], ["seen"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["seen", "both"], ["weights"]),
            helper.make_node("Add", ["cross.0.key", "cross.0.value"], ["source"]),
            helper.make_node("Mul", ["source", "weights"], ["masked"]),
            helper.make_node("ReduceSum", ["masked", "third"], ["read"], keepdims=0),
            helper.make_node("Add", ["said", "read"], ["sum"]),
            helper.make_node("Tanh", ["sum"], ["hidden"]),
            *head_nodes("hidden"),
        ],
        [value("input_ids", ["batch", "sequence"], int64), positions, mask, *past, *cross],
        [value("logits", ["batch", "positions", vocab]), *present],
        {
            "own": own,
            "head": head,
            "second": second,
            "third": third,
            "axis": np.array(1, np.int64),
            "both": np.array([1, 3], np.int64),
            "last_axis": np.array([2], np.int64),
        },
    )

    def reference(ids: Any, source: Any, picture: np.ndarray | None = None) -> np.ndarray:
        read = 3 * table[np.asarray(source)].sum(0)
        if picture is not None:
            read = read + 3 * picture.reshape(3, width).sum(0)
        return np.asarray(np.tanh(np.cumsum(own[np.asarray(ids)], 0) + read) @ head)

    graphs = {"encoder.onnx": encoder, "decoder.onnx": decoder}
    return ({"vision.onnx": vision, **graphs} if images else graphs), reference


def make_pair(folder: Path, images: bool = True, **changes: Any) -> Toy:
    tokenizer = byte_level_tokenizer()
    vocab = tokenizer.get_vocab_size()
    files, reference = pair_graphs(vocab, images)
    shape = {"kv_heads": 1, "key_dim": 4, "value_dim": 4}
    picture = {"channels": 3, "height": 2, "width": 2, "vectors": 3, "dim": 4}
    fields = {
        "task": "text2text-generation",
        "family": "encoder-decoder",
        "graphs": {name.removesuffix(".onnx"): name for name in files},
        "model": {
            "vocab_size": vocab,
            "context_length": 48,
            "inputs": ["input_ids", "attention_mask", *(["image_features"] if images else [])],
            "decoder": {"vocab_size": vocab, "context_length": 40, "layers": [shape], "cache": "concat"},
            "cross": [shape],
            "image": picture if images else None,
            "pad_token_id": PAD,
        },
        "generation": {
            "eos_token_ids": [EOS],
            "bos_token_id": BOS,
            "pad_token_id": PAD,
            "decoder_start_ids": [BOS],
            "suppressed_ids": [PAD],
            "prefixes": {"image-to-text": "what is it"},
        },
    }
    for key, change in changes.items():
        fields[key] = fields[key] | change  # type: ignore[operator]
    steps = {"resize": {"height": 2, "width": 2}, "rescale": 1 / 255, "mean": None, "std": None}
    files = {**files, "tokenizer.json": tokenizer.to_str().encode()}
    if images:
        files["preprocessor.json"] = json.dumps(steps).encode()
    return Toy(write_bundle(folder, fields, files), reference, vocab)


@pytest.fixture(scope="session")
def pair_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_pair(tmp_path_factory.mktemp("toys") / "pair")


@pytest.fixture
def new_pair(tmp_path: Path) -> Callable[..., Toy]:
    """A fresh encoder-decoder bundle; keywords change fields of its manifest."""
    return lambda images=True, **changes: make_pair(tmp_path / "bundle", images, **changes)


@pytest.fixture(scope="session")
def shared_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_decoder(tmp_path_factory.mktemp("toys") / "shared", "shared")


@pytest.fixture(scope="session")
def half_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The shared one, with a graph for a GPU too."""
    return make_decoder(tmp_path_factory.mktemp("toys") / "half", "shared", half=True)


@pytest.fixture(scope="session")
def concat_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_decoder(tmp_path_factory.mktemp("toys") / "concat", "concat")


@pytest.fixture(params=["shared", "concat"])
def decoder_toy(request: pytest.FixtureRequest) -> Toy:
    toy: Toy = request.getfixturevalue(f"{request.param}_toy")
    return toy


@pytest.fixture
def new_decoder(tmp_path: Path) -> Callable[..., Toy]:
    """A fresh decoder bundle that a test may damage."""
    return lambda cache="shared", **changes: make_decoder(tmp_path / "bundle", cache, **changes)


@pytest.fixture
def new_encoder(tmp_path: Path) -> Callable[..., Toy]:
    return lambda task, **model: make_encoder(tmp_path / "bundle", task, **model)


@pytest.fixture
def new_vision(tmp_path: Path) -> Callable[..., Toy]:
    return lambda **steps: make_vision(tmp_path / "bundle", **steps)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def graph_bytes() -> Callable[..., bytes]:
    """Serialize nodes, inputs, outputs and weights to a model."""
    return serialize
