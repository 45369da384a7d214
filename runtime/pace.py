"""How many tokens to draft: what a call with several new tokens costs against how many of them will stay.

All of it is learnt from the calls and tokens of the running generation; nothing is measured beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_DRAFT = 15  # a call scores at most this many drafted tokens, and the one before them
_RATE = 0.1  # weight of the newest observation in every running mean
_GAIN = 1.05  # a draft must promise this much more speed than a plain step: promises are noisy


class StepCosts:
    """What a call with M new tokens takes, in plain steps: 1 + slope * (M - 1).

    The line is a good fit of quantized products up to 16 rows (benchmarks/speculation.py prints it).
    """

    def __init__(self, slope: float = 0.25) -> None:
        self.seconds: float | None = None  # of a plain step
        self.slope = slope

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a call with ``tokens`` new tokens. A single outlier counts twice its expectation."""
        if tokens == 1:
            if self.seconds is None:
                self.seconds = seconds
            self.seconds += _RATE * (min(seconds, 2 * self.seconds) - self.seconds)
        elif self.seconds is not None:
            share = max(seconds / self.seconds - 1, 0.0) / (tokens - 1)
            self.slope += _RATE * (min(share, 2 * self.slope + 0.01) - self.slope)

    def steps(self, tokens: int) -> float:
        """The cost of a call with ``tokens`` new tokens, in plain steps."""
        return 1 + self.slope * (tokens - 1)


class Chance:
    """A running mean of how often a drafted token is the one that follows."""

    def __init__(self, prior: float) -> None:
        self.value = prior

    def observe(self, hit: bool) -> None:
        self.value += _RATE * (hit - self.value)


def best_length(chances: Sequence[float], costs: StepCosts, drafting: float = 0.0) -> int:
    """How many tokens to draft, 0 for a plain step.

    ``chances``: that token j of a draft is right if those before it are; at most ``len(chances)`` are
    drafted. ``drafting``: the cost of drafting one token, in plain steps. With k drafted, a call yields the
    expected number of right ones and one more (Leviathan et al., arXiv:2211.17192, equation 1).
    """
    best, rate, reached, expected = 0, _GAIN, 1.0, 1.0
    for length, chance in enumerate(chances, 1):
        reached *= chance
        expected += reached
        speed = expected / (costs.steps(length + 1) + drafting * length)
        if speed > rate:
            best, rate = length, speed
    return best
