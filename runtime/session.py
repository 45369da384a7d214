"""Opening an onnxruntime session for one graph of a bundle, on the device asked for and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from gemini.errors import BundleError, DeviceError, UsageError
from gemini.runtime import kernels
from gemini.runtime.bundle import Bundle
from gemini.runtime.hugepages import use_huge_pages_soon
from gemini.runtime.providers import CPU, CUDA, RECORD, Provider, active_device, load_libraries, provider_list
from gemini.runtime.replay import Recordings, records, run_options
from gemini.runtime.schema import DecoderModel
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
    recordings: Recordings | None = None  # of a session whose steps a GPU may replay


_ERRORS, _FATAL = 3, 4  # what onnxruntime writes to standard error
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
    options.log_severity_level = _ERRORS
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
    """Load the graph ``key`` of a bundle: on CUDA that in half precision, on the CPU that in float32, or that
    for the runtime's own kernels (`gemini.runtime.kernels`).

    ``threads`` defaults to what the cgroup and the affinity mask allow. Raises DeviceError when the device
    is not active after loading, BundleError when onnxruntime cannot load the graph, UsageError for a bad
    thread count.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise UsageError(f"The thread count {threads!r} is not a positive integer.", "Use 1 or more threads.")
    count = usable_threads() if threads is None else threads
    options = session_options(count, spinning)
    asked = provider_list(device, ort.get_available_providers())
    half = bool(bundle.manifest.half_graphs) and asked[0][0] == CUDA
    if asked[0][0] == CUDA and not half:
        if device == "cuda":
            raise DeviceError(
                "The bundle has no graphs for a GPU.", "Compress the model again with --gpu, or use the CPU."
            )
        asked = [(CPU, {})]
    if half:
        load_libraries()
    # A step is the same work at every call where the cache is one buffer and nothing else is read.
    manifest = bundle.manifest
    model = manifest.model
    replays = half and isinstance(model, DecoderModel) and model.cache == "shared"
    portable = manifest.graphs[key]
    file = manifest.half_graphs[key] if half else kernels.graphs_here(manifest)[key]
    if not half and file != portable:
        kernels.register(options, count)
    session = _open(bundle.graph(file), options, asked, replays)
    active = active_device(device, asked, session.get_providers())
    if active == "cpu":
        if half:
            session, replays = _open(bundle.graph(portable), options, [(CPU, {})], False), False
        use_huge_pages_soon()
    return Graph(
        session,
        active,
        count,
        {node.name: (node.type, tuple(node.shape)) for node in session.get_inputs()},
        {node.name: (node.type, tuple(node.shape)) for node in session.get_outputs()},
        Recordings(session) if replays and records(session) else None,
    )


def _open(
    path: Path, options: ort.SessionOptions, asked: Sequence[Provider], replays: bool
) -> ort.InferenceSession:
    """``replays``: with steps that are recorded, where every node of the graph has a kernel for the GPU."""
    wanted = [(name, {**own, **RECORD} if replays and name == CUDA else own) for name, own in asked]
    # What cannot be recorded ends in an error, which nobody needs to read.
    options.log_severity_level = _FATAL if replays else _ERRORS
    try:
        # enable_fallback=0: onnxruntime must not rebuild the session on the CPU when a provider fails.
        session = ort.InferenceSession(
            str(path), options, providers=wanted, enable_fallback=0, disabled_optimizers=_SLOW_OPTIMIZERS
        )
    except Exception as error:  # onnxruntime raises a dozen types that share no base class
        if replays:
            return _open(path, options, asked, False)
        raise BundleError(f"onnxruntime cannot load {path.name} ({_first_line(error)}).", _REMEDY) from error
    session.disable_fallback()
    return session


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
        with _turn(graph) as options:
            (result,) = graph.session.run([output], dict(feeds), options)
    except Exception as error:
        raise run_failed(error) from error
    return np.asarray(result)


def run_bound(graph: Graph, binding: ort.IOBinding) -> None:
    """Run with everything bound beforehand; a failure inside onnxruntime is a BundleError."""
    try:
        with _turn(graph) as options:
            graph.session.run_with_iobinding(binding, options)
    except Exception as error:
        raise run_failed(error) from error


@contextmanager
def _turn(graph: Graph) -> Iterator[ort.RunOptions | None]:
    """The options of a run that is not recorded, when it is this one's turn."""
    if graph.recordings is None:
        yield None
        return
    with graph.recordings.lock:
        yield run_options()


def run_failed(error: Exception) -> BundleError:
    return BundleError(f"The graph failed while running ({_first_line(error)}).", _REMEDY)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
