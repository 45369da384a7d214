"""The learning rate over a run: linear warm-up, then half a cosine to zero (Loshchilov and Hutter, 2017)."""

from __future__ import annotations

import math


def progress(step: int, steps: int, elapsed: float, minutes: float) -> float:
    """How much of the run is over, 0 to 1: by steps or by time, whichever is further."""
    by_time = elapsed / (60 * minutes) if minutes else 0.0
    return min(1.0, max(step / steps, by_time))


def learning_rate_factor(step: int, warmup: int, done: float) -> float:
    """min(1, (step + 1) / warmup) * (1 + cos(pi * done)) / 2, where ``done`` comes from ``progress``."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return rise * 0.5 * (1.0 + math.cos(math.pi * done))
