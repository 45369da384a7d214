"""The protobuf walk finds every external file, as the onnx package does, and refuses what is not listed."""

import contextlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gemini.errors import BundleError
from gemini.runtime.external_data import check_external_data, external_locations


def external(location):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def model(graph):
    return helper.make_model(graph).SerializeToString()


def graph_with(nodes=(), tensors=()):
    return helper.make_graph(list(nodes), "g", [], [], list(tensors))


def test_no_external_data_in_an_inline_model():
    tensor = onnx.numpy_helper.from_array(np.ones(3, np.float32), "w")
    assert external_locations(model(graph_with(tensors=[tensor]))) == set()


def test_initializers_attributes_and_subgraphs_are_searched():
    constant = helper.make_node("Constant", [], ["c"], value=external("attribute.bin"))
    inner = graph_with(tensors=[external("inner.bin")])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    found = external_locations(model(graph_with([constant, branch], [external("top.bin")])))
    assert found == {"attribute.bin", "inner.bin", "top.bin"}


def test_functions_and_sparse_tensors_are_searched():
    node = helper.make_node("Constant", [], ["y"], value=external("function.bin"))
    function = helper.make_function("d", "f", [], ["y"], [node], [helper.make_opsetid("", 21)])
    graph = graph_with()
    graph.sparse_initializer.add(values=external("sparse.bin"), dims=[4])
    proto = helper.make_model(graph, functions=[function])
    assert external_locations(proto.SerializeToString()) == {"function.bin", "sparse.bin"}


def test_listed_locations_pass_and_others_are_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(model(graph_with(tensors=[external("m.onnx.data")])))
    check_external_data(tmp_path / "m.onnx", "m.onnx", frozenset({"m.onnx", "m.onnx.data"}))
    check_external_data(tmp_path / "m.onnx", "sub/m.onnx", frozenset({"sub/m.onnx.data"}))
    with pytest.raises(BundleError, match="does not list"):
        check_external_data(tmp_path / "m.onnx", "m.onnx", frozenset({"m.onnx"}))


@pytest.mark.parametrize("location", ["../x", "/etc/hostname", "", "a/../m.onnx.data", "./m.onnx.data"])
def test_a_location_must_be_spelt_as_it_is_listed(tmp_path, location):
    (tmp_path / "m.onnx").write_bytes(model(graph_with(tensors=[external(location)])))
    with pytest.raises(BundleError, match="does not list"):
        check_external_data(tmp_path / "m.onnx", "m.onnx", frozenset({"m.onnx", "m.onnx.data"}))


@pytest.mark.parametrize("data", [b"\x3a\xff", b"\x0b", b"\x80" * 12, b"\x3a\x01\x09", b"\x07\x00"])
def test_malformed_bytes_are_refused(data):
    with pytest.raises(BundleError):
        external_locations(data)


def test_random_bytes_and_deep_nesting_do_not_crash():
    rng = np.random.default_rng(0)
    good = model(graph_with(tensors=[external("x")]))
    for _ in range(300):
        broken = bytearray(good)
        broken[rng.integers(len(broken))] = int(rng.integers(256))
        with contextlib.suppress(BundleError):
            external_locations(bytes(broken))
    nested = b""
    for _ in range(2000):  # graph > node > attribute > graph …
        for key in (b"\x32", b"\x2a", b"\x0a"):
            size, length = len(nested), b""
            while size > 127:
                length, size = length + bytes([size & 127 | 128]), size >> 7
            nested = key + length + bytes([size]) + nested
    assert external_locations(b"\x3a\x80\x00" + nested) == set()
