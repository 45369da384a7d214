"""Graph files, preflight and the atomic bundle folder."""

import errno
import hashlib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from gemini.errors import BundleError, ExportError
from gemini.export import bundle
from gemini.export.float_compute import float_compute
from gemini.export.graph_file import CACHE_LINE, LARGE_BYTES, PAGE, write_graph, write_weights
from gemini.export.operators import check_operators


def _graph(nodes: list[ir.Node], arrays: dict[str, np.ndarray]) -> ir.Model:
    x = ir.val("x", ir.DataType.FLOAT, [2, 64])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23, "com.microsoft": 1})
    for name, array in arrays.items():
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
        graph.register_initializer(value)
    graph.extend(nodes)
    return ir.Model(graph, ir_version=10)


def test_equal_bytes_are_stored_once_and_aligned(tmp_path: Path):
    table = np.arange(4096, dtype=np.uint8).reshape(64, 64)
    arrays = {"a": table, "b": table.reshape(64, 2, 32), "c": table[:40] + 1, "small": np.ones(3, np.float32)}
    arrays["odd"] = table.reshape(-1)[:2_000] + 2
    arrays["large"] = np.arange(LARGE_BYTES, dtype=np.uint32).astype(np.uint8)
    model = _graph([], arrays)
    sizes = write_weights([model], tmp_path / "g.data")
    assert sizes == {"a": 4096, "b": 0, "c": 2560, "small": 12, "odd": 2_000, "large": LARGE_BYTES}
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert tensors["a"].offset == tensors["b"].offset
    assert tensors["c"].offset == 4096 and tensors["odd"].offset == 6656  # not a page, but a line
    assert tensors["odd"].offset % CACHE_LINE == 0 and tensors["large"].offset % PAGE == 0
    assert (tmp_path / "g.data").stat().st_size == 12_288 + LARGE_BYTES
    write_graph(model, tmp_path / "g.onnx")
    loaded = ir.load(tmp_path / "g.onnx")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded.graph.initializers[name].const_value.numpy(), array)


def test_operator_without_kernel_is_named():
    x = ir.val("x", ir.DataType.FLOAT, [2])
    node = ir.node("NoSuchOperator", [x], domain="com.microsoft")
    model = ir.Model(
        ir.Graph([x], [], nodes=[node], opset_imports={"": 23, "com.microsoft": 1}), ir_version=10
    )
    with pytest.raises(ExportError, match=r"com\.microsoft::NoSuchOperator"):
        check_operators(model)


def test_operator_with_kernel_for_other_types_is_refused():
    x = ir.val("x", ir.DataType.FLOAT16, [2, 4])
    node = ir.node("Gelu", [x])
    model = ir.Model(ir.Graph([x], [], nodes=[node], opset_imports={"": 20}), ir_version=10)
    # Gelu has only a float32 kernel, but the standard defines it by other operators.
    assert check_operators(model) == ["ai.onnx::Gelu"]
    node = ir.node("MatMulNBits", [ir.val("y", ir.DataType.DOUBLE, [1])], domain="com.microsoft")
    model = ir.Model(ir.Graph([], [], nodes=[node], opset_imports={"com.microsoft": 1}), ir_version=10)
    with pytest.raises(ExportError, match="DOUBLE"):
        check_operators(model)


def test_float_compute_leaves_no_trace():
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.integers(-128, 127, (64, 8), dtype=np.int8),
        "s": rng.random(8, dtype=np.float32),
        "z": np.zeros(8, np.int8),
    }
    model = _graph([], arrays)
    graph = model.graph
    values = [graph.inputs[0], *(graph.initializers[name] for name in arrays)]
    node = ir.node("DynamicQuantizeMatMul", values, domain="com.microsoft")
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with float_compute(model):
        assert [n.op_type for n in graph] == ["DequantizeLinear", "MatMul", "DynamicQuantizeMatMul"]
        assert graph.outputs[0].name == "y"
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def _old_bundle(folder: Path) -> dict[str, str]:
    folder.mkdir()
    (folder / "manifest.json").write_text("old")
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def test_existing_bundle_is_kept_without_force(tmp_path: Path):
    _old_bundle(tmp_path / "out")
    with pytest.raises(BundleError, match="--force"):
        bundle.check_output(tmp_path / "out", force=False)
    bundle.check_output(tmp_path / "out", force=True)


def test_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="not a bundle"):
        bundle.check_output(tmp_path / "out", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="not a folder"):
        bundle.check_output(tmp_path / "file", force=True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), BundleError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("bug"), RuntimeError),
    ],
)
def test_failure_while_writing_leaves_no_half_bundle_and_keeps_the_old_one(tmp_path: Path, error, expected):
    before = _old_bundle(tmp_path / "out")
    with pytest.raises(expected), bundle.staging(tmp_path / "out") as folder:
        (folder / "decoder.onnx").write_bytes(b"half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (tmp_path / "out").iterdir()
    } == before


def test_failed_rename_puts_the_old_bundle_back(tmp_path: Path, monkeypatch):
    before = _old_bundle(tmp_path / "out")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(BundleError, match="full"), bundle.staging(tmp_path / "out") as folder:
        (folder / "manifest.json").write_text("new")
        bundle.commit(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (tmp_path / "out").iterdir()
    } == before


def test_new_bundle_replaces_the_old_one(tmp_path: Path):
    _old_bundle(tmp_path / "out")
    with bundle.staging(tmp_path / "out") as folder:
        (folder / "manifest.json").write_text("new")
        bundle.commit(folder, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
