"""What a token, a start and memory cost as a function of size and context, fitted to what was measured.

    python -m gemini.benchmarks.scaling BUNDLE BUNDLE BUNDLE BUNDLE ... [--threads N]

Every bundle of a decoder runs in a process of its own; their turns alternate. The fits are linear with terms
that cannot be negative, and say how far they are off at worst; they are then asked about models of 1, 3 and
8 billion parameters. The last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gemini.benchmarks.contestants import bytes_per_token
from gemini.benchmarks.host import host_facts
from gemini.benchmarks.page import markdown_lines
from gemini.benchmarks.peers.ask import ask_load, ask_memory, ask_run, random_batch
from gemini.benchmarks.peers.compare import Row, open_process, turn
from gemini.benchmarks.peers.field import Peer, bundle_peers
from gemini.benchmarks.resources import folder_bytes, last_level_cache
from gemini.errors import GeminiEdgeError, UsageError
from gemini.runtime import kernels
from gemini.runtime.bundle import Bundle, read_bundle
from gemini.runtime.schema import DecoderModel
from gemini.runtime.threads import usable_threads

CONTEXTS = (128, 512, 1024, 2048)  # tokens read before the timed ones
NEW, STARTS, TIMEOUT = 24, 3, 300.0
LEAST = 4  # sizes
_FLOAT32, _FLOAT16 = 4, 2  # bytes of a key's or value's number


@dataclass(frozen=True)
class Shape:
    """What costs depend on: layers, bytes of weights that a token reads, of the folder, and of the keys and
    values of one token of context."""

    name: str
    layers: int
    weight_bytes: int
    bundle_bytes: int
    cache_bytes: int


@dataclass(frozen=True)
class Measurement:
    """Of one shape: milliseconds from starting a process to a loaded model, and for each context the median
    milliseconds of a token and the peak megabytes of the process so far."""

    shape: Shape
    load_ms: float
    step_ms: dict[int, float]
    peak_mb: dict[int, float]


@dataclass(frozen=True)
class Fit:
    """target = sum of coefficient x term; ``worst``: the largest error of a point, as a share of it."""

    terms: dict[str, float]
    worst: float

    def at(self, terms: Mapping[str, float]) -> float:
        """The value for other terms of the same names."""
        return sum(self.terms[name] * value for name, value in terms.items())


def llama_shape(
    name: str, hidden: int, inner: int, layers: int, kv: int, vocabulary: int, tied: bool
) -> Shape:
    """The shape of a Llama from `gemini.random_bundles`; ``kv``: numbers in the keys of a token and a layer.

    Blocks of 64: 4 bits, a float16 scale and a 4-bit zero point; 8 bits and a scale for table and head.
    """
    linear = layers * hidden * (2 * hidden + 2 * kv + 3 * inner) * (4 + 20 / 64) / 8
    table = hidden * vocabulary * (8 + 16 / 64) / 8
    read, stored = int(linear + table), int(linear + table * (1 if tied else 2))
    return Shape(name, layers, read, stored, 2 * layers * kv * (_FLOAT16 if kernels.wanted() else _FLOAT32))


def larger_shapes() -> list[Shape]:
    """From the published configurations of Llama 3.2 1B and 3B and Llama 3.1 8B."""
    return [
        llama_shape("1B", 2048, 8192, 16, 512, 128_256, tied=True),
        llama_shape("3B", 3072, 8192, 28, 1024, 128_256, tied=True),
        llama_shape("8B", 4096, 14_336, 32, 1024, 128_256, tied=False),
    ]


def shape_of(bundle: Bundle) -> Shape:
    """UsageError unless the bundle is of a decoder."""
    model = bundle.manifest.model
    if not isinstance(model, DecoderModel):
        raise UsageError(f"{bundle.path.name} is for {bundle.manifest.task}.", "Name bundles of decoders.")
    numbers = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in model.layers)
    half = bool(bundle.manifest.fused_graphs) and kernels.wanted()
    return Shape(
        bundle.path.name,
        len(model.layers),
        bytes_per_token(bundle),
        folder_bytes(bundle.path),
        numbers * (_FLOAT16 if half else _FLOAT32),
    )


def measure(paths: Sequence[Path], threads: int, rounds: int) -> list[Measurement]:
    """Measure all bundles, their turns alternating, in the contexts that all of them have room for."""
    bundles = [read_bundle(path) for path in paths]
    shapes = [shape_of(bundle) for bundle in bundles]
    models = [m for bundle in bundles if isinstance(m := bundle.manifest.model, DecoderModel)]
    contexts = [c for c in CONTEXTS if c + NEW < min(model.context_length for model in models)]
    if not contexts:
        raise UsageError(f"The contexts are shorter than {CONTEXTS[0]} tokens.", "Name larger models.")
    peers = bundle_peers([path.resolve() for path in paths])
    loads = _loads(peers, threads)
    steps: list[dict[int, float]] = [{} for _ in peers]
    peaks: list[dict[int, float]] = [{} for _ in peers]
    with ExitStack() as stack:
        rows = [Row(peer) for peer in peers]
        for row in rows:
            row.process = stack.enter_context(open_process(row.peer, threads))
            ask_load(row.process, row.peer, threads, TIMEOUT)
            row.process.pause()
        for context in tqdm(contexts, "contexts", disable=None, leave=False):
            times: list[list[float]] = [[] for _ in rows]
            for number in range(rounds + 1):  # the first warms up
                batch = random_batch(min(model.vocab_size for model in models), 1, context, number)
                for row, taken in zip(rows, times, strict=True):
                    with turn(row) as process:
                        run = ask_run(process, batch, NEW, TIMEOUT)
                        taken += [1e3 * seconds for seconds in run.tokens] if number else []
            for row, taken, step, peak in zip(rows, times, steps, peaks, strict=True):
                step[context] = float(np.median(taken))
                with turn(row) as process:
                    peak[context] = ask_memory(process, TIMEOUT)
    return [Measurement(*each) for each in zip(shapes, loads, steps, peaks, strict=True)]


def _loads(peers: Sequence[Peer], threads: int) -> list[float]:
    """Median milliseconds from starting a process to a loaded model."""
    taken: list[list[float]] = [[] for _ in peers]
    for _ in tqdm(range(STARTS), "starts", disable=None, leave=False):
        for peer, own in zip(peers, taken, strict=True):
            with open_process(peer, threads) as process:
                ask_load(process, peer, threads, TIMEOUT)
                own.append(1e3 * process.age())
    return [float(np.median(own)) for own in taken]


def step_terms(shape: Shape, context: int) -> dict[str, float]:
    """A token reads the weights and the cache, and visits every layer."""
    return {
        "token": 1.0,
        "layer": float(shape.layers),
        "GB of weights": shape.weight_bytes / 1e9,
        "GB of cache": context * shape.cache_bytes / 1e9,
    }


def load_terms(shape: Shape) -> dict[str, float]:
    """A start reads and checks the bundle."""
    return {"start": 1.0, "GB of bundle": shape.bundle_bytes / 1e9}


def memory_terms(shape: Shape, context: int) -> dict[str, float]:
    """Memory holds the process, the weights and the cache."""
    return {
        "process": 1.0,
        "MB of bundle": shape.bundle_bytes / 1e6,
        "MB of cache": context * shape.cache_bytes / 1e6,
    }


def fit(points: Sequence[tuple[Mapping[str, float], float]]) -> Fit:
    """Least squares of relative errors over (terms, value), none below 0: the best subset of terms."""
    names = list(points[0][0])
    values = np.array([value for _, value in points])
    matrix = np.array([[terms[name] for name in names] for terms, _ in points]) / values[:, None]
    best: NDArray[np.float64] = np.zeros(len(names))
    for kept in map(
        list, chain.from_iterable(combinations(range(len(names)), n + 1) for n in range(len(names)))
    ):
        found = np.zeros(len(names))
        found[kept] = np.linalg.lstsq(matrix[:, kept], np.ones(len(values)), rcond=None)[0]
        if (found >= 0).all() and np.square(matrix @ found - 1).sum() < np.square(matrix @ best - 1).sum():
            best = found
    worst = float(np.abs(matrix @ best - 1).max())
    return Fit(dict(zip(names, best.tolist(), strict=True)), worst)


def fits(measured: Sequence[Measurement], cached: int = 0) -> dict[str, Fit]:
    """Of a token's milliseconds, a start's milliseconds and the peak megabytes.

    Weights of ``cached`` bytes at the most stay in the processor's cache, where a byte costs less: a token's
    time is fitted without them, if there are LEAST others.
    """
    beyond = [one for one in measured if one.shape.weight_bytes > cached]
    timed = beyond if len(beyond) >= LEAST else measured
    return {
        "step_ms": fit([(step_terms(m.shape, c), ms) for m in timed for c, ms in m.step_ms.items()]),
        "load_ms": fit([(load_terms(m.shape), m.load_ms) for m in measured]),
        "peak_mb": fit([(memory_terms(m.shape, c), mb) for m in measured for c, mb in m.peak_mb.items()]),
    }


def predict(found: Mapping[str, Fit], shape: Shape, context: int) -> dict[str, float]:
    """Milliseconds of a token and a start, megabytes at the peak."""
    return {
        "step_ms": found["step_ms"].at(step_terms(shape, context)),
        "load_ms": found["load_ms"].at(load_terms(shape)),
        "peak_mb": found["peak_mb"].at(memory_terms(shape, context)),
    }


def tables(measured: Sequence[Measurement], found: Mapping[str, Fit]) -> str:
    """What was measured, the fits, and what they say of larger models, in Markdown."""
    contexts = list(measured[0].step_ms)
    head = ["model", "layers", "weights MB", "load ms"]
    head += [f"{what} at {context}" for what in ("ms", "peak MB") for context in contexts]
    rows = [
        [m.shape.name, str(m.shape.layers), f"{m.shape.weight_bytes / 1e6:.0f}", f"{m.load_ms:.0f}"]
        + [f"{m.step_ms[c]:.1f}" for c in contexts]
        + [f"{m.peak_mb[c]:.0f}" for c in contexts]
        for m in measured
    ]
    lines = [["fitted", "worst error", "terms"]] + [
        [
            name,
            f"{100 * one.worst:.0f} %",
            ", ".join(f"{value:.3g} a {term}" for term, value in one.terms.items()),
        ]
        for name, one in found.items()
    ]
    larger = [["extrapolated", "weights MB", "context", "tokens/s", "load s", "peak MB"]]
    for shape in larger_shapes():
        for context in (CONTEXTS[0], CONTEXTS[-1]):
            said = predict(found, shape, context)
            figures = (
                f"{shape.weight_bytes / 1e6:.0f}",
                str(context),
                f"{1e3 / said['step_ms']:.1f}",
                f"{said['load_ms'] / 1e3:.1f}",
                f"{said['peak_mb']:.0f}",
            )
            larger.append([shape.name, *figures])
    return "\n\n".join(markdown_lines(part) for part in ([head, *rows], lines, larger))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, fit, print."""
    parser = argparse.ArgumentParser(prog="python -m gemini.benchmarks.scaling", description=__doc__)
    parser.add_argument("bundles", metavar="BUNDLE", type=Path, nargs="+")
    parser.add_argument("--threads", metavar="N", type=int, default=usable_threads())
    parser.add_argument("--rounds", metavar="N", type=int, default=3)
    options = parser.parse_args(arguments)
    try:
        if len(options.bundles) < LEAST:
            raise UsageError(
                f"{len(options.bundles)} sizes are too few to fit.", f"Name {LEAST} bundles or more."
            )
        measured = measure(options.bundles, options.threads, options.rounds)
    except GeminiEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    found = fits(measured, last_level_cache())
    print(tables(measured, found))
    result: dict[str, Any] = {
        "schema_version": 1,
        "host": host_facts(options.threads, "cpu"),
        "threads": options.threads,
        "measured": [asdict(one) for one in measured],
        "fits": {name: asdict(one) for name, one in found.items()},
        "larger": {
            shape.name: {str(context): predict(found, shape, context) for context in CONTEXTS}
            for shape in larger_shapes()
        },
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
