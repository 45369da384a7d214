"""Small graphs and their fused forms, for tests of the runtime's own kernels."""

import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from gemini.export.stages import DOMAIN, fuse_stages, known_shapes
from gemini.runtime import kernels

FLOAT = TensorProto.FLOAT
CONTRIB = "com.microsoft"


def model_of(nodes, inputs, outputs, constants):
    """A model; inputs and outputs are {name: shape} or {name: (type, shape)}."""

    def infos(values):
        pairs = {n: v if isinstance(v, tuple) else (FLOAT, v) for n, v in values.items()}
        return [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in pairs.items()]

    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), stored)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def fused(model, widths=None):
    """The fused form as a proto; every inner value is said to be (b, s, its width)."""
    own = ir.from_proto(model)
    shapes = known_shapes(own) | {name: ("b", "s", str(width)) for name, width in (widths or {}).items()}
    copy = fuse_stages(own, shapes)
    return None if copy is None else ir.to_proto(copy)


def session(model, threads=2):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if any(node.domain == DOMAIN for node in model.graph.node):
        kernels.register(options, threads)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def change_attribute(proto, name, change):
    """Let the only node's attribute be what ``change`` makes of its integers."""
    (node,) = proto.graph.node
    (attribute,) = [a for a in node.attribute if a.name == name]
    values = change(list(attribute.ints))
    del attribute.ints[:]
    attribute.ints.extend(values)
