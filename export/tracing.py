"""From a torch module to an ONNX graph in memory: torch.export, then torch's ONNX converter, nothing
optimised."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

from gemini.export.graphs import Graph

# The lowest standard opset with everything the converter emits for LayerNormalization and Gelu. Graphs with
# operators of a later one (RMSNormalization) ask for it.
LOWEST_OPSET = 20


def trace(graph: Graph, opset: int = LOWEST_OPSET) -> ir.Model:
    """Trace a graph once; raises whatever torch.export or the converter raise."""
    with torch.no_grad(), _quiet():
        program = _exported(graph)
        _unify_casts(program)
        try:
            with _without_decomposition():
                model = _converted(program, graph, opset)
        except Exception:  # some operator exists only in decomposed form; the converter raises many kinds
            model = _converted(program, graph, opset)
    model.producer_name, model.producer_version = "gemini-edge", None
    model.doc_string = None
    return model


def _converted(program: torch.export.ExportedProgram, graph: Graph, opset: int) -> ir.Model:
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


def _unify_casts(program: torch.export.ExportedProgram) -> None:
    """Every spelling of ``x.to(...)`` as the one operator that the converter has a rule for."""
    for node in program.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "overloadpacket", None) is torch.ops.aten.to:
            node.target = torch.ops.aten._to_copy.default
            node.args, node.kwargs = node.args[:1], {"dtype": node.meta["val"].dtype}


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
