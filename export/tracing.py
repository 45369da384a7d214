"""From a torch module to an ONNX graph in memory: torch.export, then torch's ONNX converter, nothing
optimised."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.onnx._internal.exporter._errors import DispatchError

from gemini.export.graphs import Graph

# The lowest standard opset with everything the converter emits for LayerNormalization and Gelu. Graphs with
# operators of a later one (RMSNormalization) ask for it.
LOWEST_OPSET = 20


class NotConverted(Exception):
    """What has no counterpart in ONNX: which module uses it (None: unknown) and the reason.

    ``unknown_operator``: there is no rule for an operator of torch at all, however it is called.
    """

    def __init__(self, module: str | None, reason: BaseException) -> None:
        super().__init__(str(reason))
        self.module, self.reason = module, reason
        self.unknown_operator = isinstance(reason, DispatchError)


def trace(graph: Graph, opset: int = LOWEST_OPSET) -> ir.Model:
    """Trace a graph once; raises whatever torch.export raises, or NotConverted."""
    with torch.no_grad(), _quiet():
        program = _exported(graph)
        _respell(program.graph)
        try:
            with _without_decomposition():
                model = _converted(program, graph, opset)
        except Exception as error:  # some operator exists only in decomposed form; it raises many kinds
            module = _module_of(error, program.graph)
            try:
                model = _converted(program, graph, opset)
            except Exception as again:
                raise NotConverted(module, _innermost(again)) from again
    model.producer_name, model.producer_version = "gemini-edge", None
    model.doc_string = None
    return model


def _innermost(error: BaseException) -> BaseException:
    """The error that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _module_of(error: BaseException, graph: torch.fx.Graph) -> str | None:
    """``layers.3.mlp (LlamaMLP)``: the module with the node that the converter stopped at."""
    names, cause = set(), error.__cause__
    while cause is not None:
        names |= set(re.findall(r"node %(\w+)", str(cause)))
        cause = cause.__cause__
    for node in graph.nodes:
        if node.name in names and node.meta.get("nn_module_stack"):
            path, kind = list(node.meta["nn_module_stack"].values())[-1]
            name = kind if isinstance(kind, str) else kind.__name__
            path = re.sub(r"^(L\['self'\]\.|_export_root\.)?(model\.)?", "", path)
            return f"{path} ({name.rpartition('.')[2]})"
    return None


def _converted(program: torch.export.ExportedProgram, graph: Graph, opset: int) -> ir.Model:
    with _kept_registry(), _known_values():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            input_names=graph.input_names,
            output_names=graph.output_names,
        )
    assert converted is not None
    return converted.model


def _respell(graph: torch.fx.Graph) -> None:
    """Operators that the converter has no rule for as others that say the same.

    One of them would be enough to have the whole program decomposed.
    """
    aten = torch.ops.aten
    for node in list(graph.nodes):
        packet = getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None
        if packet is aten.to:
            node.target = aten._to_copy.default
            node.args, node.kwargs = node.args[:1], {"dtype": node.meta["val"].dtype}
        elif packet in (aten.detach, aten.detach_, aten.lift_fresh_copy):  # of constants made while it runs
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif packet is aten.rsub and not node.args[2:] and not node.kwargs:
            node.target = aten.sub.Tensor
            node.args = (node.args[1], node.args[0])
        elif node.target is aten.batch_norm.default and not node.args[5]:  # of a model that does not learn
            *tensors, _training, momentum, epsilon, _cudnn = node.args
            with graph.inserting_before(node):
                whole = graph.call_function(
                    aten._native_batch_norm_legit_no_training.default, (*tensors, momentum, epsilon)
                )
                whole.meta["val"] = (node.meta["val"], None, None)
            node.target, node.args = operator.getitem, (whole, 0)
        elif packet is not None and packet.__name__.endswith("_") and _is_alone(node.args[0], node):
            plain = getattr(aten, packet.__name__.removesuffix("_"), None)
            overload = node.target._overloadname
            if plain is None or overload not in plain.overloads():
                continue
            node.target = getattr(plain, overload)
            behind = False
            for user in graph.nodes:
                if behind and node.args[0] in user.all_input_nodes:
                    user.replace_input_with(node.args[0], node)
                behind = behind or user is node


def _is_alone(value: Any, writer: torch.fx.Node) -> bool:
    """Whether nothing else is a view of what ``writer`` overwrites, and it is a view of nothing else."""
    return (
        isinstance(value, torch.fx.Node)
        and value.op == "call_function"
        and not any(_is_view(node) for node in (value, *value.users) if node is not writer)
    )


def _is_view(node: torch.fx.Node) -> bool:
    """Whether a node may put out memory of one of its inputs."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, torch.fx.Node) and _is_view(source)
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and (schema is None or any(each.alias_info for each in schema.returns))


@contextlib.contextmanager
def _without_decomposition() -> Iterator[None]:
    """Convert the traced operators as they are.

    The converter first decomposes what it has no rule for, by tracing the whole program again: more than
    half of an export's time, and for nothing where every operator has a rule. There is no public switch.
    """
    from torch.onnx._internal.exporter import _fx_passes

    original = _fx_passes.decompose_with_registry
    _fx_passes.decompose_with_registry = lambda program, registry: program
    try:
        yield
    finally:
        _fx_passes.decompose_with_registry = original


@contextlib.contextmanager
def _kept_registry() -> Iterator[None]:
    """Rules of the converter from the call before: making them anew takes a second each time."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    original = ONNXRegistry.__dict__["from_torchlib"]
    make = ONNXRegistry.from_torchlib
    ONNXRegistry.from_torchlib = staticmethod(lambda opset_version: _rules(make, opset_version))
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = original


@contextlib.contextmanager
def _known_values() -> Iterator[None]:
    """Let the converter's search for implicit casts use the values that tracing has found.

    It runs every node once more to know its type, which is a quarter of an export's time. Only nodes that it
    changes have another value than before, and those it runs by itself.
    """
    from torch.onnx._internal.fx.passes import type_promotion

    interpreter = type_promotion._TypePromotionInterpreter
    original = interpreter.run_node

    def run_node(self: Any, node: torch.fx.Node) -> Any:
        known = node.op == "call_function" and node.meta.get("val") is not None
        if not known:
            return original(self, node)
        with self._set_current_node(node):
            if rule := type_promotion.get_type_promotion_rule(node, self.type_promotion_table):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    interpreter.run_node = run_node
    try:
        yield
    finally:
        interpreter.run_node = original


@functools.cache
def _rules(make: Callable[[int], Any], opset: int) -> Any:
    return make(opset)


def _exported(graph: Graph) -> torch.export.ExportedProgram:
    arguments, shapes = tuple(graph.inputs.values()), graph.dynamic_shapes
    try:
        return torch.export.export(graph.module, arguments, dynamic_shapes=shapes, strict=False)
    except torch._dynamo.exc.UserError as error:
        # A table of learned positions bounds the sequence; torch says how to state that bound.
        refined = refine_dynamic_shapes_from_suggested_fixes(error.msg, shapes)
        return torch.export.export(graph.module, arguments, dynamic_shapes=refined, strict=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The converter prints progress and library warnings that say nothing to a user."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)
