"""The decoding loop. It handles token ids only and sees the model through three methods.

for row, token in token_events(inference, prompts, options, eos, limit): ...
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from gemini.errors import RequestError
from gemini.runtime.options import DEFAULT_NEW_TOKENS, GenerationOptions
from gemini.runtime.sampling import Sampler

if TYPE_CHECKING:
    from gemini.runtime.speculate import Speculator

Prompts = Sequence[Sequence[int]]
OnToken = Callable[[int, int], "bool | None"]


class Inference(Protocol):
    """What the loop needs of a model. Returned logits (B, V) are valid until the next call.

    With drafts it needs an `Extensible` as well; a `Decoder` is both.
    """

    def prefill(self, ids: Prompts) -> NDArray[np.float32]: ...
    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]: ...
    def reorder(self, rows: NDArray[np.int64]) -> None: ...
    def close(self) -> None: ...


def new_token_limit(prompts: Prompts, options: GenerationOptions, context_length: int) -> int:
    """How many tokens to generate so that the longest prompt stays inside the context.

    An explicit ``max_new_tokens`` that does not fit is a RequestError; the default is shortened instead.
    """
    longest = max(map(len, prompts), default=0)
    room = context_length - longest
    if room < 1:
        raise RequestError(
            f"The prompt has {longest} tokens and the model's context holds {context_length}.",
            f"Shorten the prompt to at most {context_length - 1} tokens.",
        )
    if options.max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if options.max_new_tokens > room:
        raise RequestError(
            f"{longest} + {options.max_new_tokens} tokens do not fit into the context of {context_length}.",
            f"Ask for at most {room} new tokens.",
        )
    return options.max_new_tokens


def token_events(
    inference: Inference,
    prompts: Prompts,
    options: GenerationOptions,
    eos: frozenset[int],
    limit: int,
    speculator: Speculator | None = None,
) -> Generator[tuple[int, int], bool | None, list[str]]:
    """Yield (row, token) for every new token, row by row within a step; with a ``speculator`` for one row.

    Send True back to end that row. A row also ends with an ``eos`` token (which is yielded) unless
    ``options.ignore_eos``, or after ``limit`` tokens. Returns why each row ended: "eos", "stop" or "length".
    """
    if speculator is not None:
        from gemini.runtime.speculate import Extensible, speculative_events

        assert isinstance(inference, Extensible) and len(prompts) == 1
        return (yield from speculative_events(inference, prompts[0], options, eos, limit, speculator))
    logits = inference.prefill(prompts)
    sampler = Sampler(options, prompts, logits.shape[-1])
    reasons = [""] * len(prompts)
    ends = frozenset() if options.ignore_eos else eos
    for count in range(1, limit + 1):
        tokens = sampler.choose(logits)
        for row, token in enumerate(tokens.tolist()):
            if reasons[row]:
                continue
            stopped = yield row, token
            if token in ends:
                reasons[row] = "eos"
            elif stopped:
                reasons[row] = "stop"
            elif count == limit:
                reasons[row] = "length"
        if all(reasons):
            break
        # Finished rows go along with whatever they sampled; nobody reads them, and rows do not see each
        # other.
        logits = inference.step(tokens)
    return reasons


def generate_tokens(
    inference: Inference,
    prompts: Prompts,
    options: GenerationOptions,
    eos: frozenset[int],
    limit: int,
    on_token: OnToken | None = None,
    speculator: Speculator | None = None,
) -> tuple[list[list[int]], list[str]]:
    """Run the loop to its end: the new tokens of each row (eos included) and why each row ended.

    A search with beams hands its tokens on once it is over.
    """
    if options.searches:
        from gemini.runtime.beams import beam_search

        try:
            found, reasons = beam_search(inference, prompts, options, eos, limit)
        finally:
            inference.close()
        for row, answer in enumerate(found):
            for token in answer:
                if on_token is not None and on_token(row, token):
                    break
        return found, reasons
    rows: list[list[int]] = [[] for _ in prompts]
    events = token_events(inference, prompts, options, eos, limit, speculator)
    try:
        row, token = next(events)
        while True:
            rows[row].append(token)
            row, token = events.send(on_token(row, token) if on_token is not None else None)
    except StopIteration as end:
        return rows, list(end.value)
    finally:
        inference.close()
