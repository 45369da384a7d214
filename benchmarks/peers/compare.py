"""gemini-edge against its peers: the same token ids, threads and processors, A B A B in living processes.

Every peer first starts a few times from nothing, in turn: process start to first token. Then one process of
each stays; every round visits each with the round's prompt, beginning with another one each time, and whoever
is not at turn is stopped. Peak memory is asked for after the rounds, before the scoring, whose logits need
memory of their own.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from gemini.benchmarks.host import host_facts
from gemini.benchmarks.latency import Ceiling, Run, distribution, summarize
from gemini.benchmarks.peers.ask import ask_load, ask_memory, ask_run, ask_score, random_batch
from gemini.benchmarks.peers.field import Peer
from gemini.benchmarks.peers.process import PeerError, PeerProcess
from gemini.benchmarks.resources import folder_bytes, read_bandwidth

PEERS_SCHEMA = 1
WARMUP = 1
SETTLED = 0.2  # seconds after which the threads that read memory no longer poll for work


@dataclass(frozen=True)
class Settings:
    """What every peer is asked for; ``timeout``: seconds that one request may take."""

    vocab_size: int
    context_length: int
    prompt_tokens: int = 128
    new_tokens: int = 128
    threads: int = 2
    repeat: int = 5
    starts: int = 3
    timeout: float = 300.0
    device: str = "cpu"


@dataclass
class Row:
    """A peer and what was measured of it; ``error`` is why it left. Seconds, rates in tokens a second."""

    peer: Peer
    error: str | None = None
    process: PeerProcess | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    peak_rss_mb: float = 0.0
    nll: float = 0.0
    scored: int = 0


def compare(peers: Sequence[Peer], windows: Sequence[Sequence[int]], settings: Settings) -> dict[str, Any]:
    """Measure all peers; the first is what ratios refer to. windows: ids that perplexity is taken over.

    Returns plain JSON types. A peer that fails at any point is a row with the reason under "error" and no
    figures; the others go on.
    """
    rows = [Row(peer) for peer in peers]
    for number in tqdm(range(settings.starts), "starts", disable=None, leave=False):
        for row in alive(rows):
            with leaving(row):
                row.starts.append(_start_once(row.peer, _prompt(settings, number), settings))
    bandwidth = 0.0
    with ExitStack() as stack:
        for row in alive(rows):
            with leaving(row):
                row.process = stack.enter_context(open_process(row.peer, settings.threads, settings.device))
                row.facts = ask_load(
                    row.process, row.peer, settings.threads, settings.timeout, settings.device
                )
                row.process.pause()
        for number in tqdm(range(WARMUP + settings.repeat), "rounds", disable=None, leave=False):
            batch = _prompt(settings, number)
            if settings.device == "cpu":
                bandwidth = max(bandwidth, _bandwidth(rows, settings.threads))
                time.sleep(SETTLED)
            going = alive(rows)
            first = number % max(1, len(going))
            for row in [*going[first:], *going[:first]]:
                with leaving(row), turn(row) as process:
                    run = ask_run(process, batch, settings.new_tokens, settings.timeout)
                    if number >= WARMUP:
                        row.runs.append(run)
        for row in alive(rows):
            with leaving(row), turn(row) as process:
                row.peak_rss_mb = ask_memory(process, settings.timeout)
        for window in tqdm(windows, "perplexity", disable=None, leave=False):
            for row in alive(rows):
                with leaving(row), turn(row) as process:
                    row.nll += ask_score(process, window, settings.timeout)
                    row.scored += len(window) - 1
    return {
        "schema_version": PEERS_SCHEMA,
        **asdict(settings),
        "warmup": WARMUP,
        "cpus": pinned_cpus(settings.threads),
        "host": host_facts(settings.threads, settings.device),
        "read_gib_per_second": bandwidth,
        "peers": [_result(row, rows[0], settings, bandwidth) for row in rows],
    }


def alive(rows: Sequence[Row]) -> list[Row]:
    """Those that nothing went wrong with so far."""
    return [row for row in rows if row.error is None]


@contextmanager
def leaving(row: Row) -> Iterator[None]:
    """A PeerError ends the row, and its process, and nothing else."""
    try:
        yield
    except PeerError as error:
        row.error = str(error)
        if row.process is not None:
            row.process.close()


@contextmanager
def turn(row: Row) -> Iterator[PeerProcess]:
    """Only this process runs inside."""
    assert row.process is not None
    row.process.resume()
    yield row.process
    row.process.pause()


def pinned_cpus(threads: int) -> list[int]:
    """The first ``threads`` processors that this process may use: the same for every peer."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return sorted(allowed)[:threads]


def open_process(peer: Peer, threads: int, device: str = "cpu") -> PeerProcess:
    """Start a peer's adapter. PeerError when its interpreter or its model is not there."""
    if not peer.model.exists():
        raise PeerError(f"there is no model {peer.model}")
    return PeerProcess(peer.command, threads, pinned_cpus(threads), own_path=peer.ours, device=device)


def paired_ratios(rates: Sequence[float], first: Sequence[float]) -> dict[str, float]:
    """How many times as fast as the first, round by round: median, lowest and highest."""
    ratios = [rate / other for rate, other in zip(rates, first, strict=True)]
    return {"p50": float(np.median(ratios)), "low": min(ratios), "high": max(ratios)}


def _prompt(settings: Settings, number: int) -> list[list[int]]:
    return random_batch(settings.vocab_size, 1, settings.prompt_tokens, number)


def _start_once(peer: Peer, batch: list[list[int]], settings: Settings) -> float:
    """Seconds from starting the interpreter to the first token of a prompt."""
    with open_process(peer, settings.threads, settings.device) as process:
        ask_load(process, peer, settings.threads, settings.timeout, settings.device)
        ask_run(process, batch, 0, settings.timeout)
        return process.age()


def _bandwidth(rows: Sequence[Row], threads: int) -> float:
    """GiB/s that the machine reads just now, over as many bytes as the smallest model's weights.

    Taken in every round, since the best of all is the ceiling that shares refer to.
    """
    weights = [row.facts["bytes_per_token"] for row in alive(rows) if row.facts["bytes_per_token"]]
    return read_bandwidth(min(weights), threads, rounds=3) if weights else 0.0


def _result(row: Row, first: Row, settings: Settings, bandwidth: float) -> dict[str, Any]:
    peer = row.peer
    size = folder_bytes(peer.model) / 1e6 if peer.model.exists() else None
    named = {"name": peer.name, "adapter": peer.adapter, "model": peer.model.name, "size_mb": size}
    if row.error is not None:
        return named | {"error": row.error}
    weights = row.facts["bytes_per_token"]
    ceiling = Ceiling(weights, bandwidth) if weights and bandwidth else None
    latency = replace(
        summarize(row.runs, settings.prompt_tokens, WARMUP, ceiling), peak_rss_mb=row.peak_rss_mb
    ).to_dict()
    result: dict[str, Any] = named | {
        "error": None,
        "versions": row.facts["versions"],
        "latency": latency,
        "start_to_first_token_ms": asdict(distribution(row.starts)) if row.starts else None,
        "perplexity": math.exp(min(row.nll / row.scored, 700)) if row.scored else None,
        "scored_tokens": row.scored,
    }
    if first.error is None:
        result["ratio"] = {
            "prefill": paired_ratios(_prefill_rates(row), _prefill_rates(first)),
            "decode": paired_ratios(_decode_rates(row), _decode_rates(first)),
        }
        if row.starts:
            result["ratio"]["start"] = paired_ratios(
                [1 / seconds for seconds in row.starts], [1 / seconds for seconds in first.starts]
            )
    return result


def _prefill_rates(row: Row) -> list[float]:
    return [1 / run.first_token for run in row.runs]


def _decode_rates(row: Row) -> list[float]:
    return [len(run.tokens) / sum(run.tokens) for run in row.runs]
