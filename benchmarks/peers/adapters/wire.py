"""The adapter's half of the conversation: requests are lines of JSON on stdin, answers leave the same way.

Every adapter beside this file runs in the environment of its own peer, where gemini is not installed: so here
is the standard library only, and numpy, which all peers bring, for the scores.

    {"do": "load", "model": path, "threads": 2, "device": "cpu"}  -> {"versions": {...}, "bytes_per_token": n}
    {"do": "run", "prompts": [[ids], ...], "new_tokens": 128}     -> {"first_token": s, "tokens": [s, ...],
                                                                     "ids": [[first, ...], ...]}
    {"do": "score", "ids": [...]}                                 -> {"nll": nats, "tokens": n}
    {"do": "memory"}                                              -> {"peak_rss_mb": 237.1}

``run`` is greedy, never stops at an end-of-text token, and answers one token a row for the prompt and
``new_tokens`` after it. Prompts of a batch have one length. A failure answers {"error": "..."}.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TextIO


class Peer(Protocol):
    """A loaded model. ``prepare`` may allocate for a shape before the clock starts."""

    versions: dict[str, str]
    bytes_per_token: int | None

    def prepare(self, batch: int, length: int) -> None: ...
    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]: ...
    def nll(self, ids: list[int]) -> float: ...


def serve(open_model: Callable[[str, int, str], Peer]) -> None:
    """Answer requests until stdin closes. Command line: the CPUs to stay on, separated by commas."""
    _end_with_parent()
    if len(sys.argv) > 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(cpu) for cpu in sys.argv[1].split(",")})
    answers = _private_stdout()
    peer: Peer | None = None
    for request in _requests():
        try:
            if request["do"] == "load":
                peer = open_model(request["model"], request["threads"], request["device"])
                answer: dict[str, Any] = {"versions": peer.versions, "bytes_per_token": peer.bytes_per_token}
            else:
                assert peer is not None, "load comes first"
                answer = _answer(peer, request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "memory":
        return {"peak_rss_mb": peak_rss_mb()}
    if request["do"] == "score":
        return {"nll": peer.nll(request["ids"]), "tokens": len(request["ids"]) - 1}
    prompts, new_tokens = request["prompts"], request["new_tokens"]
    peer.prepare(len(prompts), len(prompts[0]) + new_tokens + 1)
    return peer.generate(prompts, new_tokens)


def greedy(
    prefill: Callable[[], list[int]], step: Callable[[list[int]], list[int]], new_tokens: int
) -> dict[str, Any]:
    """Time a loop driven from here.

    prefill: the first token of each row; step: the rows' tokens -> their next.
    """
    clock = time.perf_counter
    start = clock()
    tokens = prefill()
    first = clock() - start
    seconds, steps = [], [tokens]
    for _ in range(new_tokens):
        start = clock()
        tokens = step(tokens)
        seconds.append(clock() - start)
        steps.append(tokens)
    return {
        "first_token": first,
        "tokens": seconds,
        "ids": [[int(one) for one in row] for row in zip(*steps, strict=True)],
    }


def nll_of(logits: Any, targets: list[int]) -> float:
    """Summed negative log-likelihood, nats, of targets (n,) under logits (n, V); summed in float64."""
    import numpy as np

    rows = np.asarray(logits, dtype=np.float64)
    top = rows.max(axis=1)
    chosen = rows[np.arange(len(rows)), targets]
    return float((np.log(np.exp(rows - top[:, None]).sum(axis=1)) + top - chosen).sum())


def only_on_the_cpu(device: str) -> None:
    """ValueError for another device."""
    if device != "cpu":
        raise ValueError(f"this adapter measures on the CPU and not on {device}")


def versions_of(*packages: str) -> dict[str, str]:
    """{package: version} of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, MB (10^6 bytes)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def _requests() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def _private_stdout() -> TextIO:
    """Answers keep the pipe for themselves; what a library prints goes to stderr."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _end_with_parent() -> None:
    """Linux kills this process when its parent dies, even in the middle of a computation (prctl(2))."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
