"""The linter: each combination known to be slow is refused by name, and what the exporter makes is not."""

import numpy as np
import onnx_ir as ir
import pytest

from gemini.compress.apply import run_recipe
from gemini.compress.recipe import load_recipe
from gemini.errors import ExportError
from gemini.export.exporter import export_checkpoint
from gemini.export.lint import refuse_slow, slow_because

FAST = {"K": 64, "N": 8, "bits": 4, "block_size": 32, "accuracy_level": 4}
CODES = np.zeros((8, 2, 16), np.uint8)
SCALES = np.ones((8, 2), np.float32)


def constant(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(name=name, const_value=ir.Tensor(array, name=name))


def product(zero_points=None, weight=None, scales=None, groups=None, **changes) -> ir.Node:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    inputs = [x, weight or constant("w", CODES), scales or constant("s", SCALES), zero_points, groups]
    attributes = {key: value for key, value in {**FAST, **changes}.items() if value is not None}
    return ir.node("MatMulNBits", inputs, attributes=attributes, domain="com.microsoft", name="product")


def test_what_is_fast_passes():
    assert slow_because(product()) is None
    assert slow_because(product(constant("z", np.zeros((8, 1), np.uint8)))) is None
    half = ir.node("Cast", [constant("h", SCALES.astype(np.float16))], attributes={"to": 1})
    assert slow_because(product(scales=half.outputs[0])) is None
    assert slow_because(ir.node("MatMul", [ir.Value(name="a"), ir.Value(name="b")])) is None


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (product(bits=2), "4 and 8 bits, not for 2"),
        (product(block_size=512), "blocks of 512"),
        (product(accuracy_level=None), "accuracy_level 4"),
        (product(accuracy_level=1), "accuracy_level 4"),
        (product(bits=8, accuracy_level=0), "accuracy_level 4"),
        (product(constant("z", np.zeros((8, 2), np.float32))), "not uint8"),
        (product(groups=constant("g", np.zeros(64, np.int32))), "g_idx"),
        (product(weight=ir.Value(name="w")), "packed in every call"),
        (product(scales=ir.node("Abs", [constant("s", SCALES)]).outputs[0]), "packed in every call"),
        (ir.node("QMoE", [ir.Value(name="x")], domain="com.microsoft"), "without accuracy_level 4"),
        (ir.node("SkipLayerNormalization", [ir.Value(name=n) for n in "xsg"]), "half the time"),
    ],
)
def test_what_is_slow_is_refused_by_name(node, reason):
    graph = ir.Graph([], [], nodes=[node], opset_imports={"": 21}, name="graph")
    with pytest.raises(ExportError, match=reason) as caught:
        refuse_slow(ir.Model(graph, ir_version=10))
    assert node.op_type in str(caught.value)


def test_a_slow_node_ends_an_export_before_a_file_is_written(make_checkpoint, tmp_path, monkeypatch):
    checkpoint = make_checkpoint("llama")
    run_recipe(checkpoint, load_recipe("int4"), progress=False)
    monkeypatch.setattr("gemini.export.twins.linear.INT8_ACTIVATIONS", 1)
    with pytest.raises(ExportError, match="accuracy_level 4"):
        export_checkpoint(checkpoint, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
