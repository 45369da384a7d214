"""From logits to the next token: vectorised numpy, one independent random stream a row.

Order as in transformers: repetition penalty, temperature, top-k, top-p, min-p, draw. Filters work on float
arrays (B, V) and mark removed tokens with -inf; each keeps at least the most likely token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemini.runtime.options import GenerationOptions

Floats = NDArray[np.float32]
_PART = 64  # tokens


def apply_repetition_penalty(logits: Floats, seen: NDArray[np.bool_], penalty: float) -> Floats:
    """Divide positive logits of tokens already ``seen`` (B, V) by ``penalty``, multiply negative ones.

    CTRL, arXiv:1909.05858, section 4.1, with the sign rule that keeps the penalty a penalty for negative
    logits.
    """
    places = np.flatnonzero(seen)  # few of a vocabulary
    punished = logits.flatten()
    known = punished[places]
    punished[places] = np.where(known < 0, known * np.float32(penalty), known / np.float32(penalty))
    return punished.reshape(logits.shape)


def apply_temperature(logits: Floats, temperature: float) -> Floats:
    """Scaled logits, shifted so that the largest of each row is 0: tiny temperatures cannot overflow."""
    with np.errstate(over="ignore"):  # -inf is what a vanishing probability should become
        scaled: Floats = (logits - logits.max(axis=-1, keepdims=True)) / np.float32(max(temperature, 1e-6))
    return scaled


def keep_top_k(logits: Floats, k: int) -> Floats:
    """Keep the ``k`` largest logits of each row, and any that tie with the k-th."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    thresholds = np.array([[_kth_largest(row, k)] for row in logits])
    return np.where(logits < thresholds, np.float32(-np.inf), logits)


def _kth_largest(row: Floats, k: int) -> np.float32:
    """The ``k``-th largest of (V,).

    It is no less than that of the largest of each of V / 64 parts, which most of a vocabulary is below.
    """
    parts = len(row) // _PART
    if parts > k:
        tops = row[: parts * _PART].reshape(parts, _PART).max(axis=1)
        row = row[row >= np.partition(tops, -k)[-k]]
    found: np.float32 = np.partition(row, -k)[-k]
    return found


def keep_top_p(logits: Floats, p: float) -> Floats:
    """Nucleus (arXiv:1904.09751): the smallest set of most likely tokens whose probability reaches ``p``.

    A token is removed when it and all less likely ones together have at most 1 - p. Tokens below (1 - p) / V
    can never escape that, so they are dropped first and only the rest is sorted: the same set, much less
    work.
    """
    if p >= 1.0:
        return logits
    result = np.full_like(logits, -np.inf)
    for row, own in enumerate(logits):
        weights = np.exp(own - own.max())
        total = weights.sum(dtype=np.float64)
        candidates = np.flatnonzero(weights >= np.float32((1.0 - p) / weights.size * total))
        order = candidates[np.argsort(weights[candidates], kind="stable")]
        shares = weights[order] / total
        tail = 1.0 - shares.sum() + np.cumsum(shares)
        kept = order[tail > 1.0 - p]
        kept = kept if kept.size else order[-1:]
        result[row, kept] = own[kept]
    return result


def keep_min_p(logits: Floats, p: float) -> Floats:
    """Keep tokens with at least ``p`` times the probability of the most likely one (arXiv:2407.01082)."""
    if p <= 0.0:
        return logits
    probabilities = softmax(logits)
    keep = probabilities >= p * probabilities.max(axis=-1, keepdims=True)
    return np.where(keep, logits, np.float32(-np.inf))


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Softmax over the last axis in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    weights = np.exp(shifted)
    total: NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return total


def draw(weights: NDArray[np.floating], stream: np.random.Generator) -> int:
    """An index drawn by inverse transform from ``weights`` (V,), which need not add up to 1."""
    # First a part, then one of it: adding up all, one after the other, is slow. side="right" skips tokens of
    # probability 0; scaling by the total forgives rounding, and so does taking the last one that has any.
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _PART), dtype=np.float64)
    ends = np.cumsum(sums)
    place = stream.random() * ends[-1]
    part = min(int(np.searchsorted(ends, place, side="right")), int(np.flatnonzero(sums)[-1]))
    own = weights[part * _PART : (part + 1) * _PART]
    rest = place - (ends[part - 1] if part else 0.0)
    within = int(np.searchsorted(np.cumsum(own, dtype=np.float64), rest, side="right"))
    return part * _PART + min(within, int(np.flatnonzero(own)[-1]))


def filter_logits(logits: Floats, options: GenerationOptions) -> Floats:
    """Temperature, top-k, top-p and min-p of ``options``, in that order."""
    filtered = apply_temperature(logits, options.temperature)
    filtered = keep_top_k(filtered, options.top_k)
    filtered = keep_top_p(filtered, options.top_p)
    return keep_min_p(filtered, options.min_p)


def streams(seed: int | None, rows: int) -> list[np.random.Generator]:
    """A source of random numbers a row; numpy's module for them is loaded only where something is drawn."""
    return [np.random.default_rng(None if seed is None else seed + row) for row in range(rows)]


class Sampler:
    """Chooses one token a row and remembers what the repetition penalty has to know."""

    def __init__(self, options: GenerationOptions, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        self.options = options
        self._streams = [] if options.greedy else streams(options.seed, len(prompts))
        self._seen: NDArray[np.bool_] | None = None
        if options.repetition_penalty != 1.0:
            self._seen = np.zeros((len(prompts), vocab_size), bool)
            for row, prompt in enumerate(prompts):
                self._seen[row, np.asarray(prompt, np.int64)] = True

    def choose(self, logits: Floats) -> NDArray[np.int64]:
        """The next token of each row, int64 (B,), from logits (B, V)."""
        logits = self._punished(logits)
        return self._remember(
            np.asarray(logits.argmax(axis=-1) if self.options.greedy else self._draw(logits), np.int64)
        )

    def judge(self, logits: Floats, drafted: int, proposal: NDArray[np.float64]) -> int:
        """The next token of the only row, from logits (1, V), where ``drafted`` was drawn from ``proposal``.

        ``proposal`` (V,) are probabilities. The draft is kept with probability min(1, p / q), else one is
        drawn from the positive part of p - q: what comes out is distributed as p, whatever q is (Leviathan et
        al., arXiv:2211.17192, theorem 3.5; Chen et al., arXiv:2302.01318).
        """
        target, stream = softmax(filter_logits(self._punished(logits), self.options))[0], self._streams[0]
        token = drafted
        if stream.random() * proposal[drafted] >= target[drafted]:
            rest = np.maximum(target - proposal, 0.0)
            token = draw(rest if rest.any() else target, stream)
        return int(self._remember(np.array([token]))[0])

    def _punished(self, logits: Floats) -> Floats:
        if self._seen is None:
            return logits
        return apply_repetition_penalty(logits, self._seen, self.options.repetition_penalty)

    def _remember(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._seen is not None:
            self._seen[np.arange(tokens.size), tokens] = True
        return tokens

    def _draw(self, logits: Floats) -> NDArray[np.int64]:
        """Every row consumes one number of its own stream a step."""
        filtered, chosen = filter_logits(logits, self.options), np.empty(len(logits), np.int64)
        for row, (own, stream) in enumerate(zip(filtered, self._streams, strict=True)):
            left = np.flatnonzero(own > -np.inf)  # of the whole vocabulary, or of few
            chosen[row] = left[draw(np.exp(own[left] - own[left].max()), stream)]
        return chosen
