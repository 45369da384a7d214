"""Output that a JSON schema or a regular expression accepts, and nothing else.

    generator.generate("A person:", json_schema={"type": "object", ...})
    generator.generate("When? ", regex=r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

llguidance (extra ``[constrain]``, imported only when it is needed) follows the grammar token by token; here
its mask goes onto the logits before anything else sees them, so that greedy choice, sampling, beams and
drafts all obey it.
The end token is possible only where the grammar accepts, and the only one where nothing may follow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemini.errors import RequestError
from gemini.runtime.generate import Inference
from gemini.runtime.options import GenerationOptions
from gemini.runtime.speculate import Extensible
from gemini.runtime.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# For each byte of a mask the upper bounds of its eight logits, lowest bit first: infinity, or -infinity where
# the bit is not set. Taking the minimum costs the same whether few tokens are allowed or nearly all.
_BOUNDS = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, np.inf, -np.inf).astype(np.float32)


class Grammar:
    """A compiled constraint over one vocabulary; :meth:`matcher` opens one for a row."""

    def __init__(self, vocabulary: LLTokenizer, options: GenerationOptions) -> None:
        """RequestError for a schema or an expression that is malformed or more than llguidance supports."""
        from llguidance import LLMatcher

        self._vocabulary = vocabulary
        if options.regex is not None:
            self._name, self._source = "regular expression", LLMatcher.grammar_from_regex(options.regex)
        else:
            assert options.json_schema is not None
            self._name = "JSON schema"
            try:
                schema = json.dumps(json.loads(options.json_schema))
                # At most one space between the parts: free white space is where a small model never leaves.
                # A schema may say otherwise under "x-guidance".
                self._source = LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": " ?"})
            except (ValueError, RecursionError) as error:
                raise self._refused(str(error)) from error
        failed, messages = LLMatcher.validate_grammar_with_warnings(self._source, vocabulary)
        if failed:
            raise self._refused(messages[0])

    def matcher(self) -> LLMatcher:
        """A matcher before the first token."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary, self._source, log_level=0)
        if matcher.is_error():
            raise self._refused(matcher.get_error())
        return matcher

    def _refused(self, message: str) -> RequestError:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("error:")), lines[0] if lines else "")
        return RequestError(
            f"The {self._name} cannot be followed ({reason.removeprefix('error: ')[:200]}).",
            "Correct it, or write it with simpler means.",
        )


def read_vocabulary(tokenizer: TextTokenizer, vocab_size: int, eos: frozenset[int]) -> LLTokenizer:
    """The bytes of every token, as llguidance wants them; takes about half a second for 50 000 tokens.

    RequestError if llguidance is missing, or if the model has no end token to close an answer with.
    """
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise RequestError(
            "A JSON schema or regular expression needs llguidance, which is not installed.",
            "Run pip install 'gemini-edge[constrain]'.",
        ) from error
    if not eos:
        raise RequestError("This model has no end token.", "Leave the schema or expression out.")
    # A model's table may be longer than its tokenizer's (padded) or, rarely, shorter.
    size = max(vocab_size, tokenizer.inner.get_vocab_size(with_added_tokens=True))
    try:
        return LLTokenizer(
            tokenizer.inner.to_str(), n_vocab=size, eos_token=sorted(eos), slices=LLTokenizer.json_slices()
        )
    except ValueError as error:
        raise RequestError(
            f"llguidance cannot read this model's tokenizer ({str(error)[:200]}).",
            "Leave the schema or expression out.",
        ) from error


class Constrained:
    """A model whose logits (B, V) are -inf wherever a token would leave the grammar, a matcher a row."""

    def __init__(self, inference: Inference, grammar: Grammar) -> None:
        self._inference, self._grammar = inference, grammar
        self._matchers: list[LLMatcher | None] = []  # None: the row has ended, nobody reads it
        self._drafted = self._followed = 0  # tokens of the last call after its first; those the grammar took

    def prefill(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The model's, masked: a token that may begin the answer."""
        self._matchers = [self._grammar.matcher() for _ in ids]
        self._drafted = self._followed = 0
        return self._masked(self._inference.prefill(ids))

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Follow the chosen tokens (B,), then the model's logits, masked."""
        for row, (matcher, token) in enumerate(zip(self._matchers, tokens.tolist(), strict=True)):
            # A refused token can come only from a search that ran out of better ones: that beam is lost.
            if matcher is not None and (matcher.is_stopped() or not matcher.consume_token(token)):
                self._matchers[row] = None
        return self._masked(self._inference.step(tokens))

    def extend(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Follow a chosen token and drafts of the only row; logits (M, V), masked as far as drafts fit."""
        assert isinstance(self._inference, Extensible)
        logits, (matcher,) = self._inference.extend(tokens), self._matchers
        self._drafted, self._followed = len(logits) - 1, 0
        for index, token in enumerate(np.asarray(tokens).tolist()):
            # After a draft that is impossible, and therefore never chosen, nobody reads on.
            if matcher is None or matcher.is_stopped() or not matcher.try_consume_tokens([token]):
                break
            keep_allowed(logits[index], matcher)
            self._followed = index
        return logits

    def rewind(self, count: int) -> None:
        """Forget the last ``count`` tokens of the only row."""
        assert isinstance(self._inference, Extensible)
        (matcher,) = self._matchers
        back = self._followed - (self._drafted - count)
        if matcher is not None and back > 0:
            matcher.rollback(back)
        self._drafted = self._followed = self._drafted - count
        self._inference.rewind(count)

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Let row i go on from what is row ``rows[i]`` now."""
        chosen = [self._matchers[row] for row in rows.tolist()]
        self._matchers = [None if matcher is None else matcher.deep_copy() for matcher in chosen]
        self._inference.reorder(rows)

    def close(self) -> None:
        """Free the model's cache."""
        self._inference.close()

    def _masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        for row, matcher in enumerate(self._matchers):
            if matcher is not None:
                keep_allowed(logits[row], matcher)
        return logits


def keep_allowed(logits: NDArray[np.float32], matcher: LLMatcher) -> None:
    """Set to -inf in place the logits (V,) of all tokens that ``matcher`` does not allow next.

    RequestError if none is left: the grammar is too complex, or it asks for what the model never writes.
    """
    words = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    bounds = _BOUNDS[words].reshape(-1)[: logits.size]
    np.minimum(logits, bounds, out=logits)
    if matcher.is_error() or logits.max() == -np.inf:
        reason = matcher.get_error().strip().splitlines()[:1] or ["no token of the model fits"]
        raise RequestError(
            f"The grammar cannot be followed any further ({reason[0][:200]}).", "Write it more simply."
        )
