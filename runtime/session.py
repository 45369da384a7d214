"""Opening an onnxruntime session for one graph of a bundle, on the device asked for and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from gemini.errors import BundleError, UsageError
from gemini.runtime.bundle import Bundle
from gemini.runtime.hugepages import use_huge_pages_soon
from gemini.runtime.providers import active_device, provider_list
from gemini.runtime.threads import usable_threads

_REMEDY = "Run `gemini-edge verify` on the bundle, or compress the model again with this release."


@dataclass(frozen=True)
class Graph:
    """A loaded graph: session, device, threads, and its inputs and outputs as {name: (type, shape)}."""

    session: ort.InferenceSession
    device: str
    threads: int
    inputs: Mapping[str, tuple[str, tuple[Any, ...]]]
    outputs: Mapping[str, tuple[str, tuple[Any, ...]]]


# On CPU the fused norm takes twice the time of the two nodes that it replaces (benchmarks/LOG.md).
_SLOW_OPTIMIZERS = ["SkipLayerNormFusion"]


def session_options(threads: int, spinning: bool = True) -> ort.SessionOptions:
    """Options of every session: ``threads`` inside an operator, one operator at a time, errors only in the
    log.

    ``spinning`` lets idle worker threads poll for work between operators: faster steps, busier cores.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    # 8-bit convolution weights become float once, at load, and not in every call; no other node is concerned.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Without VNNI, x86 adds pairs of unsigned times signed products in 16 bits, and they saturate: weights
    # become unsigned at load there, which is slower and right. It does nothing on other processors.
    options.add_session_config_entry("session.x64quantprecision", "1")
    # Workers that back off between polls wake late: 4 % of a decode step (benchmarks/LOG.md).
    options.add_session_config_entry("session.intra_op.spin_backoff_max", "1")
    return options


def open_graph(
    bundle: Bundle, key: str, device: str = "auto", threads: int | None = None, spinning: bool = True
) -> Graph:
    """Load the graph ``key`` of a bundle.

    ``threads`` defaults to what the cgroup and the affinity mask allow. Raises DeviceError when the device
    is not active after loading, BundleError when onnxruntime cannot load the graph, UsageError for a bad
    thread count.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise UsageError(f"The thread count {threads!r} is not a positive integer.", "Use 1 or more threads.")
    count = usable_threads() if threads is None else threads
    asked = provider_list(device, ort.get_available_providers())
    path = bundle.graph(key)
    try:
        # enable_fallback=0: onnxruntime must not rebuild the session on the CPU when a provider fails.
        session = ort.InferenceSession(
            str(path),
            session_options(count, spinning),
            providers=list(asked),
            enable_fallback=0,
            disabled_optimizers=_SLOW_OPTIMIZERS,
        )
    except Exception as error:  # onnxruntime raises a dozen types that share no base class
        raise BundleError(f"onnxruntime cannot load {path.name} ({_first_line(error)}).", _REMEDY) from error
    session.disable_fallback()
    active = active_device(device, asked, session.get_providers())
    if active == "cpu":
        use_huge_pages_soon()
    return Graph(
        session,
        active,
        count,
        {node.name: (node.type, tuple(node.shape)) for node in session.get_inputs()},
        {node.name: (node.type, tuple(node.shape)) for node in session.get_outputs()},
    )


def require(
    graph: Graph, inputs: Sequence[str], outputs: Sequence[str], optional: Sequence[str] = ()
) -> None:
    """BundleError unless the graph has these inputs and outputs and no further input but ``optional``."""
    missing = (set(inputs) - set(graph.inputs)) | (set(outputs) - set(graph.outputs))
    unknown = set(graph.inputs) - set(inputs) - set(optional)
    if missing or unknown:
        names = ", ".join(sorted(missing | unknown))[:200]
        raise BundleError(f"The graph and the manifest disagree about {names}.", _REMEDY)


def run_graph(graph: Graph, output: str, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """One output of the graph for CPU arrays; a failure inside onnxruntime is a BundleError."""
    try:
        (result,) = graph.session.run([output], dict(feeds))
    except Exception as error:
        raise run_failed(error) from error
    return np.asarray(result)


def run_bound(graph: Graph, binding: ort.IOBinding) -> None:
    """Run with everything bound beforehand; a failure inside onnxruntime is a BundleError."""
    try:
        graph.session.run_with_iobinding(binding)
    except Exception as error:
        raise run_failed(error) from error


def run_failed(error: Exception) -> BundleError:
    return BundleError(f"The graph failed while running ({_first_line(error)}).", _REMEDY)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
