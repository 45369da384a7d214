"""What a peer is asked, and whether its answer can be believed: `adapters/wire.py` holds the other half."""

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

from gemini.benchmarks.latency import Run, random_prompt
from gemini.benchmarks.peers.field import Peer
from gemini.benchmarks.peers.process import PeerError, PeerProcess


def random_batch(vocab_size: int, rows: int, tokens: int, number: int) -> list[list[int]]:
    """Random rows of ids, the same for all peers; another ``number`` has others, so no prefix cache helps."""
    seeds = range(1000 * number, 1000 * number + rows)
    return [random_prompt(tokens, vocab_size, seed)[0].tolist() for seed in seeds]


def ask_load(
    process: PeerProcess, peer: Peer, threads: int, timeout: float, device: str = "cpu"
) -> dict[str, Any]:
    """Load the model; {"versions": {package: version}, "bytes_per_token": int or None}."""
    request = {"do": "load", "model": str(peer.model), "threads": threads, "device": device}
    answer = process.ask(request, timeout)
    versions, weights = answer.get("versions"), answer.get("bytes_per_token")
    if not isinstance(versions, dict) or not (weights is None or (isinstance(weights, int) and weights > 0)):
        raise PeerError(f"it answers {answer!r} to load"[:300])
    return {
        "versions": {str(name): str(value) for name, value in versions.items()},
        "bytes_per_token": weights,
    }


def ask_run(process: PeerProcess, batch: Sequence[Sequence[int]], new_tokens: int, timeout: float) -> Run:
    """Read the prompts and generate; PeerError unless each row has all its tokens, and each token a time."""
    answer = process.ask({"do": "run", "prompts": batch, "new_tokens": new_tokens}, timeout)
    tokens, ids = answer.get("tokens"), answer.get("ids")
    if not isinstance(tokens, list) or not isinstance(ids, list):
        raise PeerError("it answers no tokens to run")
    first = answer.get("first_token")
    if not _is_positive(first) or not all(map(_is_positive, tokens)):
        raise PeerError("it answers no times to run")
    counts = {len(row) if isinstance(row, list) else 0 for row in ids}
    if len(tokens) != new_tokens or len(ids) != len(batch) or counts != {new_tokens + 1}:
        raise PeerError(f"it stopped before {new_tokens} tokens after the first")
    return Run(float(first), tuple(map(float, tokens)))


def ask_score(process: PeerProcess, ids: Sequence[int], timeout: float) -> float:
    """Negative log-likelihood, nats, of all ids but the first."""
    answer = process.ask({"do": "score", "ids": ids}, timeout)
    nll = answer.get("nll")
    if answer.get("tokens") != len(ids) - 1 or not isinstance(nll, int | float) or not math.isfinite(nll):
        raise PeerError("its logits are not numbers")
    return float(nll)


def ask_memory(process: PeerProcess, timeout: float) -> float:
    """Peak resident memory, MB."""
    peak = process.ask({"do": "memory"}, timeout).get("peak_rss_mb")
    if not _is_positive(peak):
        raise PeerError("it answers no peak memory")
    return float(peak)


def _is_positive(value: Any) -> TypeGuard[float]:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
