"""Which layer gets which format, when bytes are few.

chosen = allocate({"layer": [Choice("4 bits", 500, 0.2), Choice("8 bits", 900, 0.001)]}, budget=40_000)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Format = TypeVar("Format")


@dataclass(frozen=True)
class Choice(Generic[Format]):
    """A format that a layer could have: its bytes, and the loss it is expected to add."""

    format: Format
    bytes: int
    loss: float


def allocate(
    choices: Mapping[str, Sequence[Choice[Format]]], budget: int | None = None, loss: float = 0.0
) -> dict[str, Choice[Format]]:
    """The choice for each layer that keeps the sum of losses small and the sum of bytes within ``budget``.

    Every layer starts at its fewest bytes; then the step that takes away the most loss per byte is made, as
    long as it fits and the sum of losses is above ``loss``. Only choices on the lower convex hull of (bytes,
    loss) are considered, on which steps of one layer become ever less worth while. The sum is then the least
    possible for the bytes used; what is left of the budget is smaller than the step that did not fit (the
    greedy solution of the linear multiple choice knapsack: Sinha and Zoltners, "The Multiple-Choice Knapsack
    Problem", 1979).

    Raises:
        ValueError: even the fewest bytes exceed the budget.
    """
    hulls = {name: lower_hull(each) for name, each in choices.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    least = sum(choice.bytes for choice in chosen.values())
    if budget is not None and least > budget:
        raise ValueError(f"the smallest formats need {least} bytes, {least - budget} more than allowed")
    left = math.inf if budget is None else budget - least
    lost = sum(choice.loss for choice in chosen.values())
    steps = [(-_gain(hull, 0), name, 1) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps and lost > loss:
        _, name, place = heapq.heappop(steps)
        hull = hulls[name]
        more = hull[place].bytes - hull[place - 1].bytes
        if more > left:
            continue  # this layer stays as it is; a smaller one may still fit
        chosen[name], left = hull[place], left - more
        lost -= hull[place - 1].loss - hull[place].loss
        if place + 1 < len(hull):
            heapq.heappush(steps, (-_gain(hull, place), name, place + 1))
    return chosen


def lower_hull(choices: Sequence[Choice[Format]]) -> list[Choice[Format]]:
    """The choices that no mixture of others beats, by growing bytes and falling loss."""
    hull: list[Choice[Format]] = []
    for choice in sorted(choices, key=lambda each: (each.bytes, each.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], choice) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(fewer: Choice[Format], more: Choice[Format]) -> float:
    """Loss taken away per byte."""
    return (fewer.loss - more.loss) / (more.bytes - fewer.bytes)


def _gain(hull: Sequence[Choice[Format]], place: int) -> float:
    return _slope(hull[place], hull[place + 1])
