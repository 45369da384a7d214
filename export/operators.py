"""Preflight: does the installed onnxruntime have a CPU kernel for every node of a graph, with these types?

The answer comes from the registry of the installed library itself, so it is right for every version of it.
"""

from __future__ import annotations

import os
from functools import cache

import onnx
import onnx_ir as ir

from gemini.errors import ExportError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

CPU = "CPUExecutionProvider"


@cache
def _kernels() -> dict[tuple[str, str], list[tuple[int, int, dict[str, list[str]]]]]:
    """(domain, operator) -> [(first version, last version, {constraint: types})] on CPU."""
    import onnxruntime.capi.onnxruntime_pybind11_state as registry

    table: dict[tuple[str, str], list[tuple[int, int, dict[str, list[str]]]]] = {}
    for kernel in registry.get_all_opkernel_def():
        if kernel.provider == CPU:
            first, last = kernel.version_range
            entry = (first, last, dict(kernel.type_constraints))
            table.setdefault((kernel.domain, kernel.op_name), []).append(entry)
    return table


@cache
def _input_constraints() -> dict[tuple[str, str, int], list[str]]:
    """(domain, operator, since version) -> the constraint name of each input."""
    import onnxruntime.capi.onnxruntime_pybind11_state as registry

    return {
        (schema.domain, schema.name, schema.since_version): [i.typeStr for i in schema.inputs]
        for schema in registry.get_all_operator_schema()
    }


def check_operators(model: ir.Model) -> list[str]:
    """All operators of the graph as ``domain::Name``, sorted; ExportError names those that cannot run."""
    missing = set()
    for node in model.graph:
        version = model.opset_imports.get(node.domain, 1)
        if not _has_kernel(node, version) and not _is_function(node, version):
            types = ", ".join(str(v.dtype) for v in node.inputs if v is not None and v.dtype is not None)
            missing.add(f"{_name(node)} version {version} ({types})")
    if missing:
        raise ExportError(
            f"The installed onnxruntime has no CPU kernel for {'; '.join(sorted(missing))}.",
            "Update onnxruntime, or report the architecture that needs this operator.",
        )
    return sorted({_name(node) for node in model.graph})


def _name(node: ir.Node) -> str:
    return f"{node.domain or 'ai.onnx'}::{node.op_type}"


def _has_kernel(node: ir.Node, version: int) -> bool:
    domain = "" if node.domain == "ai.onnx" else node.domain
    fitting = [k for k in _kernels().get((domain, node.op_type), []) if k[0] <= version <= k[1]]
    return any(_types_fit(node, domain, version, constraints) for _, _, constraints in fitting)


def _is_function(node: ir.Node, version: int) -> bool:
    """Whether the standard defines the operator by others, which onnxruntime then inlines."""
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "" if node.domain == "ai.onnx" else node.domain)
    except onnx.defs.SchemaError:
        return False
    return any(bool(getattr(schema, name)) for name in ("has_function", "has_context_dependent_function"))


def _types_fit(node: ir.Node, domain: str, version: int, constraints: dict[str, list[str]]) -> bool:
    since = [v for d, n, v in _input_constraints() if (d, n) == (domain, node.op_type) and v <= version]
    names = _input_constraints()[(domain, node.op_type, max(since))] if since else []
    for value, name in zip(node.inputs, names, strict=False):
        if value is None or value.dtype is None or name not in constraints:
            continue
        if _runtime_type(value.dtype) not in constraints[name]:
            return False
    return True


def _runtime_type(dtype: ir.DataType) -> str:
    names = {ir.DataType.FLOAT: "float", ir.DataType.DOUBLE: "double"}
    return f"tensor({names.get(dtype, dtype.name.lower())})"
