"""Rotary tables as nodes: equal to the tables of transformers' own modules, refused where nothing fits."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gemini.export.fusions.patterns import new_initializer
from gemini.export.fusions.rotary_tables import compute_rotary_tables, find_frequencies

POSITIONS, WIDTH = 4096, 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def tables(**rope):
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=1,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **rope},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(POSITIONS)[None])
    return cos[0, :, : WIDTH // 2].numpy(), sin[0, :, : WIDTH // 2].numpy()


def graph_with(cos, sin):
    """Attention of one head over tables, as the exporter writes it."""
    text = (
        '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n'
        f"g (float[1,3,{WIDTH}] q, float[1,1,8,{WIDTH}] k, float[1,1,8,{WIDTH}] v, int32[1] s, int32[1] t)"
        f" => (float[1,3,{WIDTH}] y, float[1,1,8,{WIDTH}] pk, float[1,1,8,{WIDTH}] pv) {{ y, pk, pv ="
        " com.microsoft.GroupQueryAttention<num_heads=1, kv_num_heads=1, do_rotary=1>"
        "(q, q, q, k, v, s, t, c, d) }"
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    (node,) = model.graph
    for index, (name, table) in enumerate((("c", cos), ("d", sin)), start=7):
        node.replace_input_with(index, new_initializer(model.graph, name, table))
    return model


def attend(model):
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    past = np.zeros((1, 1, 8, WIDTH), np.float32)
    query = generator.standard_normal((1, 3, WIDTH), np.float32)
    feeds = {"q": query, "k": past, "v": past, "s": np.array([2], np.int32), "t": np.array([3], np.int32)}
    return session.run(None, feeds)


@pytest.mark.parametrize("rope", [{}, {"rope_theta": 1e6}, LLAMA3, YARN], ids=["10k", "1M", "llama3", "yarn"])
def test_the_frequencies_of_a_model_are_found_to_the_last_bit(rope):
    cos, sin = tables(**rope)
    frequencies, factor = find_frequencies(cos, sin)
    assert frequencies.dtype == np.float32 and (factor > 1.05) is (rope is YARN)
    angle = (np.arange(POSITIONS, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    np.testing.assert_allclose(factor * np.cos(angle), cos, atol=1e-6)
    np.testing.assert_allclose(factor * np.sin(angle), sin, atol=1e-6)


@pytest.mark.parametrize("rope", [{}, YARN], ids=["10k", "yarn"])
def test_the_nodes_attend_as_the_tables_do(rope):
    model = graph_with(*tables(**rope))
    expected = attend(model)
    assert compute_rotary_tables(model.graph) == 1
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) < 500
    for found, wanted in zip(attend(model), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_tables_that_no_frequency_gives_stay():
    cos, sin = tables()
    other = np.where(np.arange(POSITIONS)[:, None] < 2048, cos, np.roll(cos, 1, axis=1))
    noisy = np.random.default_rng(0).uniform(-1, 1, cos.shape).astype(np.float32)
    for pair in ((other, sin), (noisy, noisy), (sin, cos)):
        model = graph_with(*pair)
        assert compute_rotary_tables(model.graph) == 0 and len(list(model.graph)) == 1
