"""The judge of encoder-decoders: the encoder reads, the decoder is measured on what it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gemini.benchmarks.accuracy import record_teacher, score_generator
from gemini.benchmarks.latency import measure_generator
from gemini.benchmarks.text import TextSource
from gemini.export.bundle import answer_facts
from gemini.export.encoder_decoder import Source, decode, encode, image_features, reads_text
from gemini.model.checkpoint import Checkpoint
from gemini.model.vision import pixel_shape
from gemini.runtime import Seq2SeqGenerator
from gemini.runtime.scoring import split_window
from gemini.runtime.seq2seq import CAPTION
from gemini.samples import NEW_TOKENS, PROMPT_TOKENS, WINDOWS, Score, pictures, text_windows


class PairJudge:
    """An encoder-decoder: the encoder reads the first half of a window of text, the decoder continues it.

    Perplexity, KL and top-1 agreement as of a generator. Of a model that reads images also how often the
    first token of an answer about a picture stays the same; one that reads nothing else has every window
    continue a picture.
    """

    metric = "perplexity"

    def __init__(self, checkpoint: Checkpoint, text: TextSource, folder: Path) -> None:
        self.checkpoint, self.text = checkpoint, text
        model = checkpoint.model
        assert checkpoint.tokenizer is not None
        answers = answer_facts(checkpoint)
        self.start = answers["decoder_start_ids"]
        self.prefix, self.question = (
            checkpoint.tokenizer(answers["prefixes"].get(task, ""), add_special_tokens=False)["input_ids"]
            for task in (checkpoint.task, CAPTION)
        )
        self.pixels = None
        if checkpoint.processor is not None and (self.question or not reads_text(model)):
            self.pixels = pictures(pixel_shape(model))
        self.windows = text_windows(checkpoint, text, WINDOWS, reserved=len(self.prefix) + len(self.start))
        self.teacher, score = record_teacher(self._logits, self.windows, folder)
        self.first = self._first_torch()
        self.reference = {**score.to_dict(), **self._image_score(self.first)}

    def _logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        source, target = split_window(ids, self.prefix)
        return self._answer({"input_ids": torch.from_numpy(source)}, target)

    def _answer(self, source: Source, target: NDArray[np.int64]) -> NDArray[np.float32]:
        model = self.checkpoint.model
        if not reads_text(model):
            assert self.pixels is not None
            source = {"pixel_values": self.pixels[:1]}
        else:
            source = source | {"attention_mask": torch.ones_like(source["input_ids"])}
        ids = torch.tensor([[*self.start, *row] for row in target.tolist()])
        with torch.no_grad():
            logits = decode(model, *encode(model, source), ids)
        answer: NDArray[np.float32] = logits[:, len(self.start) - 1 :].float().numpy()
        return answer

    def _first_torch(self) -> NDArray[np.int64] | None:
        """The first token of the answer about each picture (n,)."""
        if self.pixels is None or not reads_text(self.checkpoint.model):
            return None
        nothing = np.zeros((1, 0), np.int64)
        question = torch.tensor([self.question])
        with torch.no_grad():
            features = image_features(self.checkpoint.model, self.pixels)
        tokens = [
            self._answer({"input_ids": question, "image_features": features[i : i + 1]}, nothing).argmax()
            for i in range(len(features))
        ]
        return np.array(tokens)

    def _image_score(self, first: NDArray[np.int64] | None) -> Score:
        return {} if first is None else {"image_agreement": float((first == self.first).mean())}

    def score_torch(self) -> Score:
        score = score_generator(self._logits, self.windows, self.teacher).to_dict()
        return {**score, **self._image_score(self._first_torch())}

    def score_session(self, session: Seq2SeqGenerator) -> Score:
        pixels = None if self.pixels is None else self.pixels.numpy()

        def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            source, target = split_window(ids, self.prefix)
            if session.takes_text:
                return session.logits(source, target)
            assert pixels is not None
            return session.logits(None, target, pixels[:1])

        score = score_generator(logits, self.windows, self.teacher).to_dict()
        first = None
        if self.first is not None:
            answers = session.inference(1, pixels).prefill([self.question] * len(self.first))
            first = answers.argmax(-1)
        return {**score, **self._image_score(first)}

    def latency(self, session: Seq2SeqGenerator) -> dict[str, Any]:
        context = session.model.context_length
        prompt, new = min(PROMPT_TOKENS, context), min(NEW_TOKENS, context - len(self.start) - 1)
        pixels = None if session.takes_text or self.pixels is None else self.pixels[:1].numpy()
        vocabulary = session.model.vocab_size or session.model.decoder.vocab_size
        inference = session.inference(new, pixels)
        try:
            report = measure_generator(inference, prompt, new, repeat=2, vocab_size=vocabulary)
        finally:
            inference.close()
        return report.to_dict()

    def data(self) -> dict[str, Any]:
        return {
            **self.text.to_dict(),
            "tokens": sum(w.size for w in self.windows),
            "images": 0 if self.pixels is None else len(self.pixels),
        }


def calibration_feeds(checkpoint: Checkpoint, windows: Sequence[NDArray[np.int64]]) -> list[Any]:
    """Windows of text as inputs of the model: halves for encoder and decoder, pictures if it takes any."""
    if checkpoint.family != "encoder-decoder" or not windows:
        return list(windows)
    start = answer_facts(checkpoint)["decoder_start_ids"]
    images = None if checkpoint.processor is None else pictures(pixel_shape(checkpoint.model), len(windows))
    feeds = []
    for index, ids in enumerate(windows):
        source, target = split_window(ids, ())
        feed: dict[str, Any] = {"decoder_input_ids": np.concatenate([[start], target], 1)}
        if reads_text(checkpoint.model):
            feed |= {"input_ids": source, "attention_mask": np.ones_like(source)}
        if images is not None:
            feed["pixel_values"] = images[index : index + 1]
        feeds.append(feed)
    return feeds
