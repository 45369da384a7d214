"""Drafts by a smaller model of the same vocabulary, in step with what the large one decided."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemini.runtime.decoder import Decoder
from gemini.runtime.options import GenerationOptions
from gemini.runtime.pace import MAX_DRAFT, Chance, StepCosts, best_length
from gemini.runtime.sampling import draw, filter_logits, softmax
from gemini.runtime.speculate import Draft

_CHUNK = 16  # tokens that the draft model catches up on in one call
_PATIENCE = 16  # plain steps after drafting stopped paying; doubled each time, up to:
_LONGEST_PATIENCE = 256


class ModelDrafter:
    """Drafts from ``decoder``, a fresh batch of the small model, as long as its drafts pay.

    With sampling a draft is drawn with the same temperature and filters, but no repetition penalty: that
    matters to how often it is kept, not to what comes out.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: Sequence[int],
        options: GenerationOptions,
        costs: StepCosts,
    ) -> None:
        self._decoder, self._options, self._costs = decoder, options, costs
        self._tokens = list(prompt)  # what is decided
        self._cached: list[int] = []  # what the small model has read: decided tokens, then drafted ones
        self._agreed = 0  # how many of the cached tokens are known to be decided
        self._open: list[int] = []  # drafted tokens that are not yet decided about
        self._chance, self._drafting = Chance(0.7), 0.3
        self._wait, self._patience = 0, _PATIENCE
        self._stream = np.random.default_rng(None if options.seed is None else [options.seed, 1])

    def push(self, token: int) -> None:
        """Take in the token that the large model decided for."""
        self._tokens.append(token)
        if self._open:
            hit = self._open.pop(0) == token
            self._chance.observe(hit)
            if not hit:
                self._open.clear()

    def propose(self, limit: int) -> Draft:
        """At most ``limit`` tokens; none while drafting does not pay or beyond the small model's context."""
        limit = min(limit, MAX_DRAFT, self._decoder.context_length - len(self._tokens) - 1)
        if limit < 1:
            return Draft()
        if self._wait:
            self._wait -= 1
            return Draft()
        count = best_length([self._chance.value] * limit, self._costs, self._drafting)
        if count:
            self._patience = _PATIENCE
        else:  # a single draft shows whether that is still so
            self._wait, self._patience, count = self._patience, min(2 * self._patience, _LONGEST_PATIENCE), 1
        return self._draft(count)

    def close(self) -> None:
        """Free the small model's cache."""
        self._decoder.close()

    def _draft(self, count: int) -> Draft:
        logits = self._catch_up()
        tokens: list[int] = []
        proposals: list[NDArray[np.float64]] = []
        while True:
            if self._options.greedy:
                tokens.append(int(logits[-1].argmax()))
            else:
                proposals.append(softmax(filter_logits(logits[-1:], self._options))[0])
                tokens.append(draw(proposals[-1], self._stream))
            if len(tokens) == count:
                break
            started = time.perf_counter()
            logits = self._decoder.step([tokens[-1]])
            self._cached.append(tokens[-1])
            if self._costs.seconds is not None:
                share = (time.perf_counter() - started) / self._costs.seconds
                self._drafting += 0.1 * (min(share, 2 * self._drafting) - self._drafting)
        self._open = list(tokens)
        return Draft(tokens, proposals or None)

    def _catch_up(self) -> NDArray[np.float32]:
        """Let the small model read what it has not; logits (n, V), the last row those of the next token."""
        if not self._cached:
            self._cached = list(self._tokens)
            self._agreed = len(self._cached)
            return self._decoder.prefill([self._tokens])
        shared = min(len(self._cached), len(self._tokens) - 1)
        while self._agreed < shared and self._cached[self._agreed] == self._tokens[self._agreed]:
            self._agreed += 1
        self._decoder.rewind(len(self._cached) - self._agreed)
        for start in range(self._agreed, len(self._tokens), _CHUNK):
            logits = self._decoder.extend(self._tokens[start : start + _CHUNK])
        self._cached = list(self._tokens)
        self._agreed = len(self._cached)
        return logits
