"""Speculative decoding of a single row: several drafted tokens are scored in one call, the right ones stay.

The target model decides about every token: greedily or by drawing, with all filters and penalties, from the
logits that follow the tokens before it. A draft can therefore change how many calls are needed, not what
comes out: the argmax of the same model, or a draw from the same distribution. The logits of a call with
several new tokens differ in their last bits from those of single steps, because other kernels compute them;
how far that reaches is measured by `gemini.benchmarks.speculation` and written down in docs/speculation.md.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemini.runtime.options import GenerationOptions
from gemini.runtime.pace import StepCosts
from gemini.runtime.sampling import Sampler


@dataclass(frozen=True)
class Draft:
    """Tokens that may follow; ``proposals``: the distribution (V,) each was drawn from, if it was drawn."""

    tokens: list[int] = field(default_factory=list)
    proposals: list[NDArray[np.float64]] | None = None


class Drafter(Protocol):
    """Where drafts come from."""

    def push(self, token: int) -> None: ...
    def propose(self, limit: int) -> Draft: ...
    def close(self) -> None: ...


@runtime_checkable
class Extensible(Protocol):
    """A model that scores several new tokens of a row at once and forgets those that were wrong."""

    def prefill(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]: ...
    def extend(self, tokens: ArrayLike) -> NDArray[np.float32]: ...
    def rewind(self, count: int) -> None: ...


@dataclass
class Speculation:
    """What became of the drafts: ``calls`` of the model after the prompt, tokens ``drafted``, and of those
    the ``accepted`` ones."""

    calls: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Speculator:
    """A drafter, what calls cost so far, and the count of what happened."""

    drafter: Drafter
    costs: StepCosts
    counts: Speculation = field(default_factory=Speculation)


def speculative_events(
    inference: Extensible,
    prompt: Sequence[int],
    options: GenerationOptions,
    eos: frozenset[int],
    limit: int,
    speculator: Speculator,
) -> Generator[tuple[int, int], bool | None, list[str]]:
    """:func:`gemini.runtime.generate.token_events` for one row, in fewer calls of the model."""
    drafter, counts = speculator.drafter, speculator.counts
    try:
        logits, draft, count = inference.prefill([prompt]), Draft(), 0
        sampler = Sampler(options, [prompt], logits.shape[-1])
        while True:
            for index in range(len(draft.tokens) + 1):
                token = _decide(sampler, logits[index : index + 1], draft, index)
                count += 1
                hit = index < len(draft.tokens) and token == draft.tokens[index]
                counts.accepted += hit
                stopped = yield 0, token
                if token in eos and not options.ignore_eos:
                    return ["eos"]
                if stopped:
                    return ["stop"]
                if count == limit:
                    return ["length"]
                drafter.push(token)
                if not hit:
                    break
            inference.rewind(len(draft.tokens) - index)
            draft = drafter.propose(limit - count - 1)
            started = time.perf_counter()
            logits = inference.extend([token, *draft.tokens])
            speculator.costs.observe(len(logits), time.perf_counter() - started)
            counts.calls += 1
            counts.drafted += len(draft.tokens)
    finally:
        drafter.close()


def _decide(sampler: Sampler, logits: NDArray[np.float32], draft: Draft, index: int) -> int:
    """The next token from logits (1, V).

    A draft that was not drawn needs no rejection sampling: the target draws as always, and the draft was
    right or not. That is the same rule for a point mass, and the same tokens as without drafts for a seed.
    """
    if draft.proposals is None or index == len(draft.tokens):
        return int(sampler.choose(logits)[0])
    return sampler.judge(logits, draft.tokens[index], draft.proposals[index])
