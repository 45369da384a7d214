"""How fast a session is: warm-up apart, first token apart from the others, median and tail.

Sessions come in as small protocols on arrays, so a bundle, a peer or a test double is timed by the same code.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemini.benchmarks.resources import peak_rss_mb, read_bandwidth


class DecoderSession(Protocol):
    """What timing a generator needs: ``prefill`` starts a new sequence, ``step`` appends one token a row."""

    def prefill(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """B prompts -> logits (B, V) of each last position."""

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """tokens (B,) -> logits (B, V)."""


@dataclass(frozen=True)
class Distribution:
    """Of a list of times, all in milliseconds."""

    n: int
    mean: float
    p50: float
    p90: float
    p99: float
    low: float
    high: float


@dataclass(frozen=True)
class Run:
    """One timed generation: seconds to the first token (prefill and argmax) and for each token after it."""

    first_token: float
    tokens: tuple[float, ...]


@dataclass(frozen=True)
class Ceiling:
    """Bytes that one token must read, against the read bandwidth measured here."""

    bytes_per_token: int
    read_gib_per_second: float


@dataclass(frozen=True)
class LatencyReport:
    """Greedy generation of a single sequence. Rates are tokens per second, medians over the repeats.

    ``bandwidth_percent``: share of the measured read bandwidth that decoding reaches.
    """

    prompt_tokens: int
    new_tokens: int
    repeat: int
    warmup: int
    first_token_ms: Distribution
    token_ms: Distribution
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    bytes_per_token: int | None
    read_gib_per_second: float | None
    bandwidth_percent: float | None
    peak_rss_mb: float
    samples_ms: tuple[float, ...]
    kind: str = "generator"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"samples_ms": [round(sample, 4) for sample in self.samples_ms]}


@dataclass(frozen=True)
class Point:
    """One input shape: ``tokens`` is None for images. ``items_per_second`` at the median."""

    batch: int
    tokens: int | None
    ms: Distribution
    items_per_second: float


@dataclass(frozen=True)
class BatchLatencyReport:
    """Encoders and vision models: one row for each input shape."""

    points: tuple[Point, ...]
    repeat: int
    warmup: int
    peak_rss_mb: float
    samples_ms: tuple[float, ...]
    kind: str = "batch"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"samples_ms": [round(sample, 4) for sample in self.samples_ms]}


def distribution(seconds: Sequence[float]) -> Distribution:
    """Milliseconds; percentiles by linear interpolation between ranks."""
    times = np.asarray(seconds, dtype=np.float64) * 1e3
    p50, p90, p99 = (float(value) for value in np.percentile(times, (50, 90, 99)))
    return Distribution(
        times.size, float(times.mean()), p50, p90, p99, float(times.min()), float(times.max())
    )


def random_prompt(tokens: int, vocab_size: int, seed: int = 0) -> NDArray[np.int64]:
    """(1, tokens) ids, away from both ends of the vocabulary where special tokens live."""
    margin = min(100, vocab_size // 10)
    return np.random.default_rng(seed).integers(margin, vocab_size - margin, (1, tokens))


def time_generation(session: DecoderSession, prompt: NDArray[np.int64], new_tokens: int) -> Run:
    """Generate greedily: the first token comes out of the prefill, then ``new_tokens`` follow."""
    ids = prompt.tolist()
    start = time.perf_counter()
    token = session.prefill(ids).argmax(axis=-1)
    first = time.perf_counter() - start
    steps = []
    for _ in range(new_tokens):
        start = time.perf_counter()
        token = session.step(token).argmax(axis=-1)
        steps.append(time.perf_counter() - start)
    return Run(first, tuple(steps))


def measure_generator(
    session: DecoderSession,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    repeat: int = 3,
    warmup: int = 1,
    *,
    vocab_size: int,
    bytes_per_token: int | None = None,
    threads: int = 1,
) -> LatencyReport:
    """Time ``repeat`` greedy generations after ``warmup`` unmeasured ones.

    vocab_size: prompts are random ids below it. bytes_per_token: what decoding one token reads; with it the
    read bandwidth of ``threads`` threads is measured over a working set of that size.
    """
    prompt = random_prompt(prompt_tokens, vocab_size)
    for _ in range(warmup):
        time_generation(session, prompt, new_tokens)
    runs = [time_generation(session, prompt, new_tokens) for _ in range(repeat)]
    ceiling = Ceiling(bytes_per_token, read_bandwidth(bytes_per_token, threads)) if bytes_per_token else None
    return summarize(runs, prompt_tokens, warmup, ceiling)


def summarize(
    runs: Sequence[Run], prompt_tokens: int, warmup: int, ceiling: Ceiling | None = None
) -> LatencyReport:
    """Turn timed runs into the report."""
    samples = [seconds for run in runs for seconds in run.tokens]
    decode = float(np.median([len(run.tokens) / sum(run.tokens) for run in runs]))
    reached = None
    if ceiling:
        reached = 100 * decode * ceiling.bytes_per_token / 2**30 / ceiling.read_gib_per_second
    return LatencyReport(
        prompt_tokens=prompt_tokens,
        new_tokens=len(runs[0].tokens),
        repeat=len(runs),
        warmup=warmup,
        first_token_ms=distribution([run.first_token for run in runs]),
        token_ms=distribution(samples),
        prefill_tokens_per_second=prompt_tokens / float(np.median([run.first_token for run in runs])),
        decode_tokens_per_second=decode,
        bytes_per_token=ceiling.bytes_per_token if ceiling else None,
        read_gib_per_second=ceiling.read_gib_per_second if ceiling else None,
        bandwidth_percent=reached,
        peak_rss_mb=peak_rss_mb(),
        samples_ms=tuple(seconds * 1e3 for seconds in samples),
    )


def time_calls(call: Callable[[], object], repeat: int, warmup: int) -> list[float]:
    """Seconds of each of ``repeat`` calls after ``warmup`` unmeasured ones."""
    seconds = []
    for index in range(warmup + repeat):
        start = time.perf_counter()
        call()
        if index >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds


def measure_encoder(
    run: Callable[[NDArray[np.int64]], object],
    shapes: Sequence[tuple[int, int]] = ((1, 16), (1, 128), (8, 128)),
    repeat: int = 20,
    warmup: int = 3,
    *,
    vocab_size: int,
) -> BatchLatencyReport:
    """Time an encoder. run: ids (batch, tokens) int64 -> anything; shapes: (batch, tokens)."""
    seconds = {}
    for batch, tokens in shapes:
        ids = np.concatenate([random_prompt(tokens, vocab_size, seed) for seed in range(batch)])
        seconds[batch, tokens] = time_calls(partial(run, ids), repeat, warmup)
    return summarize_batches(seconds, warmup)


def measure_image(
    run: Callable[[NDArray[np.float32]], object],
    image: tuple[int, int, int],
    batches: Sequence[int] = (1, 4),
    repeat: int = 20,
    warmup: int = 3,
) -> BatchLatencyReport:
    """Time an image model. run: pixels (batch, C, H, W) float32 -> anything; image: (C, H, W)."""
    seconds: dict[tuple[int, int | None], list[float]] = {}
    for batch in batches:
        pixels = np.random.default_rng(0).standard_normal((batch, *image), dtype=np.float32)
        seconds[batch, None] = time_calls(partial(run, pixels), repeat, warmup)
    return summarize_batches(seconds, warmup)


def summarize_batches(seconds: dict[Any, list[float]], warmup: int) -> BatchLatencyReport:
    """seconds: {(batch, tokens or None): one for each call}. The plot's samples are the last shape's."""
    points = []
    for (batch, tokens), times in seconds.items():
        spread = distribution(times)
        points.append(Point(batch, tokens, spread, batch * 1e3 / spread.p50))
    last = list(seconds.values())[-1]
    return BatchLatencyReport(
        tuple(points), len(last), warmup, peak_rss_mb(), tuple(value * 1e3 for value in last)
    )
