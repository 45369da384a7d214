"""Tokens to text while they arrive: whole characters only, spaces kept, stop strings cut out."""

from __future__ import annotations

from collections.abc import Sequence

from gemini.runtime.tokenizer import TextTokenizer

_REPLACEMENT = "\ufffd"
_MAX_HELD = 32  # no character needs so many tokens: what is held longer is not going to become one


class Detokenizer:
    """Turns tokens into text piece by piece; the pieces together are the text of all tokens.

    A tokenizer may drop the leading space of the first token it decodes, so every piece is decoded together
    with the tokens of the piece before it and only the difference is new. A piece that ends in U+FFFD may be
    half a character and waits for the next token.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the previous piece's tokens, then those not yet emitted
        self._emitted = 0  # how many of them belong to the previous piece

    def push(self, token: int) -> str:
        """The text that became certain with this token, possibly empty."""
        self._ids.append(token)
        return self._take(final=len(self._ids) - self._emitted > _MAX_HELD)

    def finish(self) -> str:
        """The rest, when no token follows."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._emitted])
        now = self._tokenizer.decode(self._ids)
        if len(now) <= len(before) or (now.endswith(_REPLACEMENT) and not final):
            if final:  # nothing but special tokens: they leave no text, and must not pile up
                del self._ids[self._emitted :]
            return ""
        self._ids = self._ids[self._emitted :]
        self._emitted = len(self._ids)
        return now[len(before) :]


class StopMatcher:
    """Passes text through until a stop string appears, however the text is cut into pieces.

    Text that may be the beginning of a stop string is held back until that is decided. The stop string
    itself and everything after it are dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        hits = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if hits:
            self.stopped, self._held = True, ""
            return text[: min(hits)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Detokenizer and StopMatcher of one row."""

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str]) -> None:
        self._detokenizer, self._matcher = Detokenizer(tokenizer), StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        return self._matcher.stopped

    def push(self, token: int) -> str:
        return self._matcher.push(self._detokenizer.push(token))

    def finish(self) -> str:
        return self._matcher.push(self._detokenizer.finish()) + self._matcher.finish()


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``."""
    return next(
        (size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0
    )
