"""Which of several compressed models are worth having: the Pareto front of time, loss and size.

    best = pick(front(candidates), Limits(loss_percent=5))     # the fastest that loses at most 5 percent

Pure functions on figures that were measured elsewhere; less is better in all three.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Candidate:
    """A compressed model: milliseconds, percent of the fp32 metric lost (negative: gained), bytes on disk."""

    name: str
    latency_ms: float
    loss_percent: float
    bytes: int


@dataclass(frozen=True)
class Limits:
    """What is allowed at most; None sets no limit."""

    latency_ms: float | None = None
    loss_percent: float | None = None

    def allow(self, candidate: Candidate) -> bool:
        """Whether the candidate keeps to both."""
        return self.excess(candidate) <= 0

    def excess(self, candidate: Candidate) -> float:
        """By how much the limit that is missed most is missed, as a share of it; 0 or less keeps to both.

        A limit below one percent of loss counts as one percent, so that none divides by zero.
        """
        shares = [-math.inf]
        if self.latency_ms is not None:
            shares.append(candidate.latency_ms / self.latency_ms - 1)
        if self.loss_percent is not None:
            shares.append((candidate.loss_percent - self.loss_percent) / max(1.0, self.loss_percent))
        return max(shares)


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that none other beats: no worse in all three figures and better in one. Fastest first.

    Candidates with equal figures beat each other not. Sorted by time, a candidate can only be beaten by one
    before it; of those the least bytes for every loss are kept as a staircase, which makes n log n
    comparisons (Kung, Luccio and Preparata, 1975).
    """
    kept: list[Candidate] = []
    losses: list[float] = []  # the staircase: losses rise, and with each the bytes fall
    sizes: list[int] = []
    figures = None
    for candidate in sorted(candidates, key=_figures):
        if _figures(candidate) == figures:  # the equal of the one before, which may have been kept
            if kept and _figures(kept[-1]) == figures:
                kept.append(candidate)
            continue
        figures = _figures(candidate)
        step = bisect_right(losses, candidate.loss_percent) - 1
        if step >= 0 and sizes[step] <= candidate.bytes:
            continue
        kept.append(candidate)
        start = end = bisect_left(losses, candidate.loss_percent)
        while end < len(sizes) and sizes[end] >= candidate.bytes:
            end += 1
        losses[start:end], sizes[start:end] = [candidate.loss_percent], [candidate.bytes]
    return kept


def near_front(candidates: Sequence[Candidate], slack: float) -> list[Candidate]:
    """Those that would be on the front if their own time were shorter by the share ``slack``, in [0, 1).

    So times that may be off by that much leave nothing out that belongs to the front.
    """
    near = []
    for index, candidate in enumerate(candidates):
        hurried = replace(candidate, latency_ms=(1 - slack) * candidate.latency_ms)
        if hurried in front([*candidates[:index], hurried, *candidates[index + 1 :]]):
            near.append(candidate)
    return near


def pick(candidates: Sequence[Candidate], limits: Limits) -> Candidate | None:
    """The best of those within the limits, by what is not limited; None if there is none.

    A limit on the loss alone asks for the fastest, a limit on the time alone for the most accurate, and both
    for the smallest; the other figures decide between equals.
    """
    within = [candidate for candidate in candidates if limits.allow(candidate)]
    if limits.latency_ms is not None and limits.loss_percent is not None:
        return min(within, key=lambda c: (c.bytes, c.loss_percent, c.latency_ms), default=None)
    if limits.loss_percent is not None:
        return min(within, key=lambda c: (c.latency_ms, c.bytes, c.loss_percent), default=None)
    return min(within, key=lambda c: (c.loss_percent, c.latency_ms, c.bytes), default=None)


def closest(candidates: Sequence[Candidate], limits: Limits, count: int) -> list[Candidate]:
    """The ``count`` that miss the limits least, nearest first."""
    return sorted(candidates, key=limits.excess)[:count]


def _figures(candidate: Candidate) -> tuple[float, float, int]:
    return candidate.latency_ms, candidate.loss_percent, candidate.bytes
