"""Prompt lookup: drafts copied from where the last tokens appeared before, in the prompt or in the answer.

A. Saxena, Prompt Lookup Decoding, 2023 (github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

from gemini.runtime.pace import MAX_DRAFT, Chance, StepCosts, best_length
from gemini.runtime.speculate import Draft

_LONGEST = 3  # n-grams of up to so many tokens are indexed; longer matches are found by reading backwards
_CLASSES = 8  # matches of so many tokens and more are one class


class NgramIndex:
    """All n-grams of a growing sequence; a new token costs the same however long the sequence is."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}  # n-gram: the position after its latest occurrence

    def push(self, token: int) -> None:
        """Append a token. An n-gram is indexed once a token follows it."""
        end = len(self.tokens)
        for size in range(1, min(_LONGEST, end) + 1):
            self._last[tuple(self.tokens[end - size :])] = end
        self.tokens.append(token)

    def match(self) -> tuple[int, int] | None:
        """(position, length): what followed the latest earlier occurrence of the longest known suffix.

        ``length`` counts the equal tokens before it, up to the number of classes.
        """
        end = len(self.tokens)
        for size in range(min(_LONGEST, end), 0, -1):
            position = self._last.get(tuple(self.tokens[end - size :]))
            if position is not None:
                while (
                    size < min(_CLASSES, position)
                    and self.tokens[position - size - 1] == self.tokens[end - size - 1]
                ):
                    size += 1
                return position, size
        return None

    def following(self, position: int, count: int) -> list[int]:
        """``count`` tokens from ``position`` on; past the end the sequence goes on repeating itself."""
        tokens = self.tokens[position : position + count]
        period = len(self.tokens) - position
        while len(tokens) < count:
            tokens.append(tokens[-period])
        return tokens


class LookupDrafter:
    """Drafts by lookup, as long as experience with matches of that length says it pays.

    Every token that arrives is compared with what the lookup would have said, whether it was drafted or
    not: so the experience costs nothing, and drafting that was given up resumes by itself.
    """

    def __init__(self, prompt: Sequence[int], costs: StepCosts) -> None:
        self._costs, self._index = costs, NgramIndex()
        self._chances = [Chance(1 - 0.8 ** (size + 1)) for size in range(_CLASSES)]
        for token in prompt:
            self._index.push(token)
        self._match = self._index.match()

    def push(self, token: int) -> None:
        """Take in the token that really followed."""
        if self._match is not None:
            position, size = self._match
            self._chances[size - 1].observe(self._index.tokens[position] == token)
        self._index.push(token)
        self._match = self._index.match()

    def propose(self, limit: int) -> Draft:
        """At most ``limit`` tokens, often none."""
        if self._match is None:
            return Draft()
        position, size = self._match
        ahead = range(size, size + min(limit, MAX_DRAFT))
        chances = [self._chances[min(n, _CLASSES) - 1].value for n in ahead]
        return Draft(self._index.following(position, best_length(chances, self._costs)))

    def close(self) -> None:
        """Nothing is held."""
