"""Beam search: of many texts that begin likely, the one that is likely as a whole.

    rows, reasons = beam_search(inference, prompts, options, eos, limit)

As transformers does it: the score of a text is the sum of its tokens' log-probabilities divided by their
number to the power of ``length_penalty``; of the best continuations of all beams, those that end are kept
beside the beams that go on, until none of these can be expected to beat the worst that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemini.runtime.options import GenerationOptions
from gemini.runtime.sampling import apply_repetition_penalty

_NEVER = np.float32(-1e9)  # the score of what must not be chosen


class ReorderedInference(Protocol):
    """A model whose rows can continue each other's texts."""

    def prefill(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]: ...
    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]: ...
    def reorder(self, rows: NDArray[np.int64]) -> None: ...


def beam_search(
    inference: ReorderedInference,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    eos: frozenset[int],
    limit: int,
) -> tuple[list[list[int]], list[str]]:
    """The best text of each prompt (its end token included), and why it ended: "eos" or "length".

    The model runs ``options.num_beams`` rows a prompt, those of one prompt next to each other.
    """
    count, beams = len(prompts), options.num_beams
    ends = np.array(sorted(() if options.ignore_eos else eos), np.int64)
    kept = max(2, 1 + ends.size) * beams  # so that enough go on even if each end token is likely for all
    logits = inference.prefill([prompt for prompt in prompts for _ in range(beams)])
    vocabulary = logits.shape[-1]
    kept = min(kept, beams * vocabulary)
    rows = np.arange(count)[:, None]
    scores = np.full((count, beams), _NEVER)
    scores[:, 0] = 0.0  # all beams of a prompt are still the same
    tokens = np.zeros((count, beams, limit), np.int64)
    best_scores = np.full((count, beams), _NEVER)
    best_tokens, best_lengths = np.zeros_like(tokens), np.zeros((count, beams), np.int64)
    open_rows = np.ones(count, bool)
    for step in range(limit):
        chances = log_softmax(logits).reshape(count, beams, vocabulary)
        if options.repetition_penalty != 1.0:
            chances = _punished(chances, prompts, tokens[:, :, :step], options.repetition_penalty)
        total = (scores[:, :, None] + chances).reshape(count, -1)
        # From the largest on: where most must not be chosen, and are all alike, the other way takes ten times
        # as long.
        top = np.argpartition(-total, kept - 1, axis=1)[:, :kept]
        top = top[rows, np.argsort(-total[rows, top], axis=1, kind="stable")]
        found, origin, token = total[rows, top], top // vocabulary, top % vocabulary
        texts = tokens[rows, origin]
        texts[:, :, step] = token
        ended = np.isin(token, ends) | (step + 1 == limit)
        # Only what is among the best `beams` may end; a worse text would end a search for better ones.
        counted = ended & (np.arange(kept) < beams) & open_rows[:, None]
        if options.early_stopping:
            counted &= ~(best_lengths > 0).all(1, keepdims=True)
        ending = np.where(counted, found / np.float32((step + 1) ** options.length_penalty), _NEVER)
        merged = np.concatenate([best_scores, ending], axis=1)
        order = np.argsort(-merged, axis=1, kind="stable")[:, :beams]
        lengths = np.concatenate([best_lengths, np.where(counted, step + 1, 0)], axis=1)
        best_tokens = np.concatenate([best_tokens, texts], axis=1)[rows, order]
        best_scores, best_lengths = merged[rows, order], lengths[rows, order]
        going = np.where(ended, _NEVER, found)
        order = np.argsort(-going, axis=1, kind="stable")[:, :beams]
        scores, tokens = going[rows, order], texts[rows, order]
        full = (best_lengths > 0).all(1)
        hoped = scores[:, 0] / np.float32((step + 1) ** options.length_penalty)
        open_rows &= ~full | (hoped > best_scores[:, -1])
        if step + 1 == limit or not open_rows.any() or (options.early_stopping and full.all()):
            break
        inference.reorder((rows * beams + origin[rows, order]).ravel())
        logits = inference.step(tokens[:, :, step].ravel())
    answers = [
        row[:length].tolist() for row, length in zip(best_tokens[:, 0], best_lengths[:, 0], strict=True)
    ]
    return answers, ["eos" if answer[-1] in ends else "length" for answer in answers]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """log softmax over the last axis, float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _punished(
    chances: NDArray[np.float32],
    prompts: Sequence[Sequence[int]],
    tokens: NDArray[np.int64],
    penalty: float,
) -> NDArray[np.float32]:
    """The repetition penalty of each beam's own text (count, beams, V), in place: it holds few tokens."""
    for row, prompt in enumerate(prompts):
        own = np.broadcast_to(np.asarray(prompt, np.int64), (len(tokens[row]), len(prompt)))
        ids = np.concatenate([own, tokens[row]], axis=1)
        seen = np.take_along_axis(chances[row], ids, axis=1)
        np.put_along_axis(
            chances[row], ids, apply_repetition_penalty(seen, np.ones_like(seen, bool), penalty), axis=1
        )
    return chances
