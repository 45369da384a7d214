"""The text of a running generation: tokens go in as they are chosen, text and a finished answer come out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemini.runtime.generate import Inference, Prompts, token_events
from gemini.runtime.options import GenerationOptions
from gemini.runtime.streaming import TextStream
from gemini.runtime.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from gemini.runtime.speculate import Speculation, Speculator


@dataclass(frozen=True)
class Generation:
    """One finished answer. ``tokens`` hold everything sampled, the end token included; ``text`` ends before
    a stop string. ``finish_reason`` is "eos", "stop" or "length"; ``speculation`` counts what drafts did."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    speculation: Speculation | None = None


class Transcript:
    """The rows of one batch; its call is the ``on_token`` of ``generate_tokens``."""

    def __init__(
        self, tokenizer: TextTokenizer, options: GenerationOptions, eos: frozenset[int], rows: int
    ) -> None:
        self._ends = frozenset() if options.ignore_eos else eos
        self._streams = [TextStream(tokenizer, options.stop) for _ in range(rows)]
        self._texts = [""] * rows

    def __call__(self, row: int, token: int) -> bool:
        """Take a token in; True if a stop string ends the row."""
        if token not in self._ends:
            self._texts[row] += self._streams[row].push(token)
        return self._streams[row].stopped

    def finished(
        self, tokens: Sequence[Sequence[int]], reasons: Sequence[str], prompt_tokens: Sequence[int]
    ) -> list[Generation]:
        """The answers, once no token follows."""
        return [
            Generation(
                self._texts[row] + stream.finish(),
                tuple(tokens[row]),
                prompt_tokens[row],
                "stop" if stream.stopped else reasons[row],
            )
            for row, stream in enumerate(self._streams)
        ]


def pieces(
    inference: Inference,
    prompts: Prompts,
    tokenizer: TextTokenizer,
    options: GenerationOptions,
    eos: frozenset[int],
    limit: int,
    speculator: Speculator | None = None,
) -> Iterator[str]:
    """The text of a single row, piece by piece in whole characters; closes ``inference`` at its end."""
    text = TextStream(tokenizer, options.stop)
    try:
        for _, token in token_events(inference, prompts, options, eos, limit, speculator):
            if options.ignore_eos or token not in eos:
                piece = text.push(token)
                if piece:
                    yield piece
            if text.stopped:
                return
        rest = text.finish()
        if rest:
            yield rest
    finally:
        inference.close()
