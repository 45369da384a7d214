"""Judges: what "accuracy" means for each family, measured the same way before and after compression.

A judge is made once from the fp32 checkpoint; its reference answers are recorded then, so the fp32 model
need not stay. Later it scores the torch model again (round-to-nearest) or a loaded bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gemini.benchmarks.accuracy import record_teacher, score_generator
from gemini.benchmarks.agreement import score_classifier, score_embedder
from gemini.benchmarks.latency import measure_encoder, measure_generator, measure_image
from gemini.benchmarks.text import TextSource, split_sentences, spread
from gemini.errors import UsageError
from gemini.export.graphs import encoder_graph
from gemini.model.checkpoint import Checkpoint
from gemini.pair_judge import PairJudge
from gemini.runtime import Embedder, ImageClassifier, TextClassifier, TextGenerator
from gemini.runtime.tokenizer import TokenBatch
from gemini.samples import NEW_TOKENS, PROMPT_TOKENS, WINDOWS, Score, pictures, text_windows

SENTENCES = 300


class Judge(Protocol):
    """metric: the key that ``--max-drop`` looks at; reference: the fp32 model's own score.

    checkpoint: what ``score_torch`` scores: the fp32 model, until one that was cut from it is put there.
    """

    metric: str
    checkpoint: Checkpoint
    reference: Score

    def score_torch(self) -> Score: ...
    def score_session(self, session: Any) -> Score: ...
    def latency(self, session: Any) -> dict[str, Any]: ...
    def data(self) -> dict[str, Any]: ...


class GeneratorJudge:
    """Perplexity, KL and top-1 agreement over windows of text."""

    metric = "perplexity"

    def __init__(self, checkpoint: Checkpoint, text: TextSource, folder: Path) -> None:
        self.checkpoint, self.text = checkpoint, text
        self.windows = text_windows(checkpoint, text, WINDOWS)
        self.teacher, score = record_teacher(self._logits, self.windows, folder)
        self.reference = score.to_dict()

    def _logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            logits: NDArray[np.float32] = self.checkpoint.model(torch.from_numpy(ids)).logits.float().numpy()
        return logits

    def score_torch(self) -> Score:
        return score_generator(self._logits, self.windows, self.teacher).to_dict()

    def score_session(self, session: TextGenerator) -> Score:
        return score_generator(session.logits, self.windows, self.teacher).to_dict()

    def latency(self, session: TextGenerator) -> dict[str, Any]:
        prompt = min(PROMPT_TOKENS, session.model.context_length // 2)
        new = min(NEW_TOKENS, session.model.context_length - prompt)
        decoder = session.decoder(new)
        try:
            report = measure_generator(decoder, prompt, new, repeat=2, vocab_size=session.model.vocab_size)
        finally:
            decoder.close()
        return report.to_dict()

    def data(self) -> dict[str, Any]:
        return {**self.text.to_dict(), "tokens": sum(w.size for w in self.windows)}


class EncoderJudge:
    """Embeddings or class logits of the same sentences."""

    def __init__(self, checkpoint: Checkpoint, text: TextSource) -> None:
        self.checkpoint, self.text = checkpoint, text
        self.sentences = spread(split_sentences(text.text), SENTENCES)
        if not self.sentences:
            raise UsageError(
                "The evaluation text holds no whole sentences.",
                "Give prose: sentences of 40 to 200 characters.",
            )
        self.embeds = checkpoint.pooling is not None
        self.metric = "cosine_mean" if self.embeds else "agreement"
        self.problem = (checkpoint.model.config.problem_type or "single_label_classification").removesuffix(
            "_classification"
        )
        self.expected = self._torch()
        self.reference = self._score(self.expected)

    def _torch(self) -> NDArray[np.float32]:
        graph = encoder_graph(self.checkpoint)
        assert self.checkpoint.tokenizer is not None
        rows = []
        for sentence in self.sentences:
            encoding = self.checkpoint.tokenizer(
                sentence, return_tensors="pt", truncation=True, max_length=self.checkpoint.context_length
            )
            feeds = {"token_type_ids": torch.zeros_like(encoding["input_ids"]), **encoding}
            with torch.no_grad():
                rows.append(graph.module(*(feeds[name] for name in graph.input_names)).float().numpy())
        return np.concatenate(rows)

    def _score(self, actual: NDArray[np.float32]) -> Score:
        if self.embeds:
            return score_embedder(actual, self.expected).to_dict()
        return _present(score_classifier(actual, self.expected, problem=self.problem).to_dict())

    def score_torch(self) -> Score:
        return self._score(self._torch())

    def score_session(self, session: Embedder | TextClassifier) -> Score:
        run = session.embed if isinstance(session, Embedder) else session.logits
        return self._score(run(self.sentences))

    def latency(self, session: Embedder | TextClassifier) -> dict[str, Any]:
        run: Callable[[TokenBatch], Any]
        run = session.embed_tokens if isinstance(session, Embedder) else session.logits_tokens
        length = min(128, session.model.context_length)

        def call(ids: NDArray[np.int64]) -> Any:
            return run(TokenBatch(ids, np.ones_like(ids), np.zeros_like(ids)))

        shapes = ((1, 16), (8, length), (1, length))
        return measure_encoder(call, shapes, vocab_size=session.model.vocab_size).to_dict()

    def data(self) -> dict[str, Any]:
        return {**self.text.to_dict(), "sentences": len(self.sentences)}


class ImageJudge:
    """Class logits of seeded synthetic pictures."""

    metric = "agreement"

    def __init__(self, checkpoint: Checkpoint, shape: Sequence[int]) -> None:
        self.checkpoint, self.pixels = checkpoint, pictures(shape)
        self.expected = self._torch()
        self.reference = self._score(self.expected)

    def _torch(self) -> NDArray[np.float32]:
        with torch.no_grad():
            batches = [self.checkpoint.model(pixel_values=p).logits.float() for p in self.pixels.split(16)]
        return torch.cat(batches).numpy()

    def _score(self, actual: NDArray[np.float32]) -> Score:
        return _present(score_classifier(actual, self.expected).to_dict())

    def score_torch(self) -> Score:
        return self._score(self._torch())

    def score_session(self, session: ImageClassifier) -> Score:
        return self._score(session.logits(self.pixels.numpy()))

    def latency(self, session: ImageClassifier) -> dict[str, Any]:
        _, channels, height, width = self.pixels.shape
        return measure_image(session.logits, (channels, height, width), (4, 1)).to_dict()

    def data(self) -> dict[str, Any]:
        return {"name": "synthetic images, seed 0", "images": len(self.pixels)}


def _present(score: Score) -> Score:
    return {key: value for key, value in score.items() if value is not None}


def make_judge(checkpoint: Checkpoint, text: TextSource, folder: Path) -> Judge:
    """The judge of the checkpoint's family; ``folder`` holds the recorded reference of a generator."""
    if checkpoint.family == "decoder":
        return GeneratorJudge(checkpoint, text, folder)
    if checkpoint.family == "encoder-decoder":
        return PairJudge(checkpoint, text, folder)
    if checkpoint.family == "encoder":
        return EncoderJudge(checkpoint, text)
    from gemini.export.graphs import sample_inputs

    return ImageJudge(checkpoint, sample_inputs(checkpoint)["pixel_values"].shape[1:])
