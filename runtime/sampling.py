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


def apply_repetition_penalty(logits: Floats, seen: NDArray[np.bool_], penalty: float) -> Floats:
    """Divide positive logits of tokens already ``seen`` (B, V) by ``penalty``, multiply negative ones.

    CTRL, arXiv:1909.05858, section 4.1, with the sign rule that keeps the penalty a penalty for negative
    logits.
    """
    punished = np.where(logits < 0, logits * np.float32(penalty), logits / np.float32(penalty))
    return np.where(seen, punished, logits)


def apply_temperature(logits: Floats, temperature: float) -> Floats:
    """Scaled logits, shifted so that the largest of each row is 0: tiny temperatures cannot overflow."""
    with np.errstate(over="ignore"):  # -inf is what a vanishing probability should become
        scaled: Floats = (logits - logits.max(axis=-1, keepdims=True)) / np.float32(max(temperature, 1e-6))
    return scaled


def keep_top_k(logits: Floats, k: int) -> Floats:
    """Keep the ``k`` largest logits of each row, and any that tie with the k-th."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    threshold = np.partition(logits, -k, axis=-1)[:, -k, None]
    return np.where(logits < threshold, np.float32(-np.inf), logits)


def keep_top_p(logits: Floats, p: float) -> Floats:
    """Nucleus (arXiv:1904.09751): the smallest set of most likely tokens whose probability reaches ``p``.

    A token is removed when it and all less likely ones together have at most 1 - p. Tokens below (1 - p) / V
    can never escape that, so they are dropped first and only the rest is sorted: the same set, much less
    work.
    """
    if p >= 1.0:
        return logits
    probabilities = softmax(logits)
    result = np.full_like(logits, -np.inf)
    for row, weights in enumerate(probabilities):
        candidates = np.flatnonzero(weights >= (1.0 - p) / weights.size)
        order = candidates[np.argsort(weights[candidates], kind="stable")]
        dropped = 1.0 - weights[order].sum()
        tail = dropped + np.cumsum(weights[order])
        kept = order[tail > 1.0 - p]
        kept = kept if kept.size else order[-1:]
        result[row, kept] = logits[row, kept]
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


def draw(weights: NDArray[np.float64], stream: np.random.Generator) -> int:
    """An index drawn by inverse transform from ``weights`` (V,), which need not add up to 1."""
    cumulative = np.cumsum(weights)
    # side="right" skips tokens of probability 0; scaling by the total forgives rounding.
    return int(np.searchsorted(cumulative, stream.random() * cumulative[-1], side="right"))


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
        weights = softmax(filter_logits(logits, self.options))
        rows = [draw(row, stream) for row, stream in zip(weights, self._streams, strict=True)]
        return np.array(rows, np.int64)
