"""Sentence embeddings and text classification.

load("minilm/").embed(["a cat", "a kitten"])            # float32 (2, dim)
load("sentiment/").classify(["What a film!"])           # [[Label("positive", 0.99), …]]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from gemini.errors import RequestError
from gemini.runtime.bundle import Bundle
from gemini.runtime.fields import damaged
from gemini.runtime.sampling import softmax
from gemini.runtime.schema import EncoderModel
from gemini.runtime.session import Graph, require, run_graph
from gemini.runtime.tokenizer import TextTokenizer, TokenBatch

BATCH = 32
WINDOW = 64  # batches' worth of texts that are tokenized at a time


@dataclass(frozen=True)
class Label:
    """A class and its score: a probability, or the raw value of a regression."""

    label: str
    score: float


class _TextEncoder:
    """What both sessions share: a graph, a tokenizer and batches of texts of equal length."""

    def __init__(self, bundle: Bundle, graph: Graph, tokenizer: TextTokenizer, output: str) -> None:
        model = bundle.manifest.model
        if not isinstance(model, EncoderModel):
            raise damaged("the manifest describes no encoder")
        require(graph, model.inputs, [output])
        self.bundle, self.graph, self.model, self.output = bundle, graph, model, output
        self.tokenizer = tokenizer

    def batches(self, texts: Sequence[str], size: int) -> Iterator[tuple[list[int], TokenBatch]]:
        """(positions in ``texts``, tokens): at most ``size`` texts of the same number of tokens.

        So nothing is padded. Padding costs time, and where activations are quantized with one scale a call,
        what stands at padded positions stretches that scale for all texts.
        """
        check_texts(texts)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise RequestError(f"The batch size {size!r} is not a positive integer.", "Use 1 or more.")
        for start in range(0, len(texts), WINDOW * size):
            encodings = self.tokenizer.encode_rows(
                texts[start : start + WINDOW * size], self.model.context_length
            )
            order = sorted(range(len(encodings)), key=lambda row: len(encodings[row].ids))
            for _, equal in groupby(order, key=lambda row: len(encodings[row].ids)):
                rows = list(equal)
                for first in range(0, len(rows), size):
                    chosen = rows[first : first + size]
                    tokens = self.tokenizer.stack([encodings[row] for row in chosen], self.model.pad_token_id)
                    yield [start + row for row in chosen], tokens

    def run(self, tokens: TokenBatch) -> NDArray[np.float32]:
        """The graph's output float32 (B, n) for one batch. RequestError for ids outside the vocabulary."""
        if tokens.input_ids.min() < 0 or tokens.input_ids.max() >= self.model.vocab_size:
            raise RequestError(
                f"A token id lies outside 0..{self.model.vocab_size - 1}.", "Use the bundle's own tokenizer."
            )
        if tokens.input_ids.shape[1] > self.model.context_length:
            raise RequestError(
                f"A text is longer than {self.model.context_length} tokens.", "Shorten the text."
            )
        return run_graph(self.graph, self.output, {name: getattr(tokens, name) for name in self.model.inputs})

    def run_texts(self, texts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
        """Outputs (len(texts), n) in the order of the texts."""
        positions: list[int] = []
        rows = []
        for chosen, tokens in self.batches(texts, batch_size):
            positions += chosen
            rows.append(self.run(tokens))
        result = np.concatenate(rows)
        ordered = np.empty_like(result)
        ordered[positions] = result
        return ordered


class Embedder:
    """A session for sentence embeddings; pooling and normalisation are part of the graph."""

    def __init__(self, bundle: Bundle, graph: Graph, tokenizer: TextTokenizer) -> None:
        self._encoder = _TextEncoder(bundle, graph, tokenizer, "embedding")
        self.bundle, self.graph, self.model = bundle, graph, self._encoder.model
        self.device, self.threads, self.tokenizer = graph.device, graph.threads, tokenizer

    def embed(self, texts: Sequence[str], batch_size: int = BATCH) -> NDArray[np.float32]:
        """Embeddings float32 (n, dim). Texts beyond the model's context are cut, as in its training."""
        return self._encoder.run_texts(texts, batch_size)

    def embed_tokens(self, tokens: TokenBatch) -> NDArray[np.float32]:
        """Embeddings (B, dim) of tokens that are already encoded."""
        return self._encoder.run(tokens)


class TextClassifier:
    """A session for text classification."""

    def __init__(self, bundle: Bundle, graph: Graph, tokenizer: TextTokenizer) -> None:
        self._encoder = _TextEncoder(bundle, graph, tokenizer, "logits")
        self.bundle, self.graph, self.model = bundle, graph, self._encoder.model
        self.device, self.threads, self.tokenizer = graph.device, graph.threads, tokenizer
        if not self.model.labels:
            raise damaged("the manifest of a classifier names no labels")
        self.labels = self.model.labels

    def logits(self, texts: Sequence[str], batch_size: int = BATCH) -> NDArray[np.float32]:
        """Logits float32 (n, labels)."""
        return self._encoder.run_texts(texts, batch_size)

    def logits_tokens(self, tokens: TokenBatch) -> NDArray[np.float32]:
        """Logits (B, labels) of tokens that are already encoded."""
        return self._encoder.run(tokens)

    def classify(self, texts: Sequence[str], batch_size: int = BATCH) -> list[list[Label]]:
        """All labels of each text, best first.

        Scores: softmax for one label a text, sigmoid when labels are independent ("multi_label"), the plain
        output for "regression".
        """
        return ranked(scores(self.logits(texts, batch_size), self.model.problem), self.labels)


def check_texts(texts: Sequence[str]) -> None:
    """RequestError for what is no list of texts, or an empty one."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise RequestError("The input is not a list of texts.", "Give a list with at least one text.")
    if not all(isinstance(text, str) for text in texts):
        raise RequestError("A text of the list is not a str.", "Give a list of str.")


def scores(logits: NDArray[np.float32], problem: str | None) -> NDArray[np.float64]:
    """Scores (n, labels) from logits by the kind of problem; None means one label a text."""
    if problem == "regression":
        return logits.astype(np.float64)
    if problem == "multi_label":
        # Both branches avoid exp of a large positive number.
        small = np.exp(-np.abs(logits.astype(np.float64)))
        return np.where(logits >= 0, 1.0 / (1.0 + small), small / (1.0 + small))
    return softmax(logits)


def ranked(values: NDArray[np.float64], labels: Sequence[str]) -> list[list[Label]]:
    """Label objects of each row, highest score first; ties keep the label order."""
    if values.shape[1] != len(labels):
        raise damaged(f"the graph gives {values.shape[1]} scores for {len(labels)} labels")
    order = np.argsort(-values, axis=1, kind="stable")
    return [[Label(labels[i], float(row[i])) for i in best] for row, best in zip(values, order, strict=True)]
