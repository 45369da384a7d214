"""One condition varied, all else as it is: prompt length, batch, threads. Interleaved like the comparison.

Every sweep has processes of its own, so a peer that fails here keeps its row in the table.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from tqdm import tqdm

from gemini.benchmarks.latency import Run
from gemini.benchmarks.peers.ask import ask_load, ask_run, random_batch
from gemini.benchmarks.peers.compare import Row, Settings, alive, leaving, open_process, pinned_cpus, turn
from gemini.benchmarks.peers.field import Peer

SWEEPS: dict[str, tuple[int, ...]] = {
    "prompt": (128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16),
    "threads": (1, 2),
}
PROMPT, NEW, REPEAT = 128, 32, 2


def run_sweep(kind: str, peers: Sequence[Peer], settings: Settings) -> list[dict[str, Any]]:
    """One of ``SWEEPS`` over all peers: [{"name", "error", "points": [{kind, rates...}]}], plain JSON types.

    Values that the context or the processors have no room for are left out. ``decode_tokens_per_second``
    counts all rows of a batch together.
    """
    fits = [value for value in SWEEPS[kind] if _fits(kind, value, settings)]
    results: list[dict[str, Any]] = [{"name": peer.name, "error": None, "points": []} for peer in peers]
    same_processes = [fits] if kind != "threads" else [[value] for value in fits]
    for values in same_processes:
        threads = values[0] if kind == "threads" else settings.threads
        going = [(peer, found) for peer, found in zip(peers, results, strict=True) if not found["error"]]
        rows = [Row(peer) for peer, _ in going]
        with ExitStack() as stack:
            for row in rows:
                with leaving(row):
                    row.process = stack.enter_context(open_process(row.peer, threads, settings.device))
                    ask_load(row.process, row.peer, threads, settings.timeout, settings.device)
                    ask_run(row.process, random_batch(settings.vocab_size, 1, PROMPT, 0), 2, settings.timeout)
                    row.process.pause()
            for value in tqdm(values, f"{kind} sweep", disable=None, leave=False):
                for (_, found), point in zip(going, _points(kind, value, rows, settings), strict=True):
                    found["points"].extend(point)
        for (_, found), row in zip(going, rows, strict=True):
            found["error"] = row.error
    return results


def _points(kind: str, value: int, rows: Sequence[Row], settings: Settings) -> list[list[dict[str, Any]]]:
    """For each row its point, or none if it has left."""
    tokens = value if kind == "prompt" else PROMPT
    size = value if kind == "batch" else 1
    runs: list[list[Run]] = [[] for _ in rows]
    for number in range(REPEAT):
        batch = random_batch(settings.vocab_size, size, tokens, number + 1)
        for row, taken in zip(rows, runs, strict=True):
            if row in alive(rows):
                with leaving(row), turn(row) as process:
                    taken.append(ask_run(process, batch, NEW, settings.timeout))
    return [
        [] if row.error else [_point(kind, value, size, tokens, taken)]
        for row, taken in zip(rows, runs, strict=True)
    ]


def _point(kind: str, value: int, size: int, tokens: int, runs: Sequence[Run]) -> dict[str, Any]:
    first = float(np.median([run.first_token for run in runs]))
    decode = float(np.median([len(run.tokens) / sum(run.tokens) for run in runs]))
    return {
        kind: value,
        "first_token_ms": first * 1e3,
        "prefill_tokens_per_second": size * tokens / first,
        "decode_tokens_per_second": size * decode,
    }


def _fits(kind: str, value: int, settings: Settings) -> bool:
    if kind == "prompt":
        return value + NEW < settings.context_length
    return kind != "threads" or value <= len(pinned_cpus(value))
