"""The tasks of the mixture. Each turns examples into tensors for one loss:

    caption   <caption><en>  + image       -> grinning face</s>
    continue  <continue> a beginning       -> what comes after it</s>
    denoise   <denoise> a text with <mask> -> the whole text</s>
    classify  <classify> a review          -> <positive></s>      (or a class for the classification head)
    mimic     <classify> a text            -> the states that a larger encoder has for it  (regression head)
    name      image                        -> one class a name    (for the image classification head)

``batch(step)`` is a pure function of (seed, task, step). Texts are tokenized once, when a task is made.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemini.errors import DataError
from gemini.model.data import Review, augment
from gemini.model.data.noise import noise_text
from gemini.model.gemini import LABELS, caption_prompt, classify_prompt, continue_prompt, denoise_prompt
from gemini.model.training.corpus import Corpus
from gemini.model.training.options import TaskOptions, TrainingOptions
from gemini.model.training.order import Order, step_seed

Batch = dict[str, torch.Tensor]
_REDRAWN = 0.7  # how often a drawing is taken as another hand would have made it, where that was done
IGNORED = -100  # the label of a position that has none, torch's default


class Task(ABC):
    """A named source of batches; ``train`` switches augmentation on."""

    name: str

    def __init__(
        self, tokenizer: Any, options: TaskOptions, run: TrainingOptions, lengths: Sequence[int], train: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.run = run
        self.train = train
        self.order = Order(lengths, options.batch, run.seed, self.name)

    def batch(self, step: int) -> Batch:
        """The tensors of that step."""
        seed = step_seed(self.run.seed, self.name, step)
        return self.make(self.order.indices(step), np.random.default_rng(seed))

    @abstractmethod
    def make(self, indices: np.ndarray, generator: np.random.Generator) -> Batch:
        """Tensors of these examples; all that is random about them comes from ``generator``."""

    def pack(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Batch:
        """Padded token ids: input_ids and attention_mask (B, S), labels (B, T) with -100 for no token."""
        inputs, mask = pad(sources, self.tokenizer.pad_token_id)
        labels, _ = pad(targets, IGNORED)
        return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


class Pictures:
    """The drawings of a split in the options' size, as they are or, where there are any, redrawn."""

    def __init__(self, corpus: Corpus, options: TaskOptions) -> None:
        self.pixels = torch.from_numpy(corpus.drawings.pixels)
        self.redrawn = corpus.redrawn
        self.side = options.pixels or self.pixels.shape[1]
        self.still = options.still
        self.flippable = np.array([augment.may_flip(name) for name in corpus.drawings.en])

    def draw(self, rows: np.ndarray, generator: np.random.Generator, train: bool) -> torch.Tensor:
        """(B, 3, side, side), augmented in training."""
        pixels = self.pixels[rows]
        if train and self.redrawn is not None:
            hands = generator.integers(self.redrawn.shape[1], size=len(rows))
            others = generator.random(len(rows)) < _REDRAWN
            pixels[others] = torch.from_numpy(self.redrawn[rows[others], hands[others]])
        noise = torch.Generator().manual_seed(int(generator.integers(2**62)))
        flips = torch.from_numpy(self.flippable[rows])
        pixels = augment.shrink(pixels, self.side)
        image = augment.draw(pixels, noise, train=train, flip=flips, still=self.still)
        return image.contiguous(memory_format=torch.channels_last)


class CaptionTask(Task):
    """A drawing to its name, in a language drawn for each example."""

    name = "caption"

    def __init__(
        self, tokenizer: Any, options: TaskOptions, run: TrainingOptions, corpus: Corpus, train: bool
    ) -> None:
        drawings = corpus.drawings
        _require(len(drawings), "drawings", "gemini-edge data")
        super().__init__(tokenizer, options, run, [1] * len(drawings), train)
        self.pictures = Pictures(corpus, options)
        end = [tokenizer.eos_token_id]
        limit = run.decoder_tokens - 1
        names = {"en": drawings.en, "zh": drawings.zh}
        self.prompts = [encode(tokenizer, [caption_prompt(code)])[0] for code in options.languages]
        self.targets = [
            [ids[:limit] + end for ids in encode(tokenizer, names[code])] for code in options.languages
        ]

    def make(self, indices: np.ndarray, generator: np.random.Generator) -> Batch:
        languages = generator.integers(len(self.prompts), size=len(indices))
        batch = self.pack(
            [self.prompts[language] for language in languages],
            [self.targets[language][index] for language, index in zip(languages, indices, strict=True)],
        )
        return batch | {"pixel_values": self.pictures.draw(indices, generator, self.train)}


class NameTask(Task):
    """A drawing to the number of its name; drawings of things without a number are left out."""

    name = "name"

    def __init__(self, options: TaskOptions, run: TrainingOptions, corpus: Corpus, train: bool) -> None:
        drawings, numbers = corpus.drawings, {name: number for number, name in enumerate(corpus.names)}
        self.known = np.array([index for index, name in enumerate(drawings.en) if name in numbers])
        _require(len(self.known), "drawings", "gemini-edge data")
        super().__init__(None, options, run, [1] * len(self.known), train)
        self.pictures = Pictures(corpus, options)
        self.labels = torch.tensor([numbers[drawings.en[index]] for index in self.known])

    def make(self, indices: np.ndarray, generator: np.random.Generator) -> Batch:
        return {
            "pixel_values": self.pictures.draw(self.known[indices], generator, self.train),
            "labels": self.labels[indices],
        }


class ContinueTask(Task):
    """The beginning of a text to what follows it.

    Half of the examples start where the text does, as a user's prompt will; the others show the decoder later
    parts. The cut falls before a word, because a prompt that ends inside one is tokenized otherwise.
    """

    name = "continue"

    def __init__(
        self, tokenizer: Any, options: TaskOptions, run: TrainingOptions, texts: Sequence[str], train: bool
    ) -> None:
        self.documents = [ids for ids in encode(tokenizer, texts) if len(ids) >= 8]
        _require(len(self.documents), "texts", "gemini-edge stories")
        super().__init__(tokenizer, options, run, [len(ids) for ids in self.documents], train)
        self.prompt = encode(tokenizer, [continue_prompt("")])[0]
        self.starts_word = np.array(
            [token.startswith("Ġ") for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
        )

    def make(self, indices: np.ndarray, generator: np.random.Generator) -> Batch:
        cut = [self.cut(self.documents[index], generator) for index in indices]
        return self.pack([source for source, _ in cut], [target for _, target in cut])

    def cut(self, ids: list[int], generator: np.random.Generator) -> tuple[list[int], list[int]]:
        """(prompt, continuation) of one document; without training always its first eight tokens or so."""
        room = self.run.encoder_tokens - len(self.prompt)
        start, split = 0, min(8, len(ids) // 2)
        if self.train and generator.random() < 0.5:
            split = int(generator.integers(1, max(2, min(24, len(ids) // 2))))
        elif self.train:
            split = int(generator.integers(1, max(2, len(ids) - 8)))
            start = max(0, split - int(generator.integers(4, room)))
        words = np.flatnonzero(self.starts_word[ids[split : split + 16]])
        split += int(words[0]) if len(words) else 0
        rest = [*ids[split:], self.tokenizer.eos_token_id]
        return self.prompt + ids[start:split][-room:], rest[: self.run.decoder_tokens]


class DenoiseTask(Task):
    """A passage whose spans are masked to the passage itself (text infilling of BART, Lewis et al., 2020)."""

    name = "denoise"

    def __init__(
        self, tokenizer: Any, options: TaskOptions, run: TrainingOptions, texts: Sequence[str], train: bool
    ) -> None:
        # A masked passage must fit the encoder, and infilling never makes it longer.
        self.passages = [
            ids[start : start + run.encoder_tokens - 8]
            for ids in encode(tokenizer, texts)
            for start in range(0, len(ids), run.encoder_tokens - 8)
        ]
        self.passages = [ids for ids in self.passages if len(ids) >= 4]
        _require(len(self.passages), "texts", "gemini-edge stories")
        super().__init__(tokenizer, options, run, [len(ids) for ids in self.passages], train)
        self.prompt = encode(tokenizer, [denoise_prompt("")])[0]

    def make(self, indices: np.ndarray, generator: np.random.Generator) -> Batch:
        passages = [self.passages[index] for index in indices]
        sources = [self.prompt + infill(ids, self.tokenizer.mask_token_id, generator) for ids in passages]
        end = [self.tokenizer.eos_token_id]
        return self.pack(sources, [ids + end for ids in passages])


class ClassifyTask(Task):
    """A review to its label: a token for the decoder, or a class; in training, the share of both."""

    name = "classify"

    def __init__(
        self,
        tokenizer: Any,
        options: TaskOptions,
        run: TrainingOptions,
        reviews: Sequence[Review],
        train: bool,
    ) -> None:
        reviews = [review for review in reviews if review.language in options.languages]
        _require(len(reviews), "reviews", "gemini-edge data")
        for review in reviews:
            if review.label not in (0, 1):
                raise DataError(
                    f"The label {review.label!r} of the review {review.text[:40]!r} is neither 0 (negative) "
                    "nor 1 (positive).",
                    "Correct sentiment.jsonl, or build it again with `gemini-edge data`.",
                )
        self.texts = [review.text for review in reviews]
        self.positive = np.array([float(review.label) for review in reviews])
        if train and options.teacher:
            known = read_teacher(Path(options.teacher))
            soft = np.array([known.pop(review.text, review.label) for review in reviews])
            self.positive += options.teacher_share * (soft - self.positive)
            self.texts += known
            self.positive = np.concatenate([self.positive, list(known.values())])
        self.sources = reviews_as_prompts(tokenizer, self.texts, run.encoder_tokens)
        super().__init__(tokenizer, options, run, [len(ids) for ids in self.sources], train)
        self.answers = [tokenizer.convert_tokens_to_ids(label) for label in LABELS.values()]
        self.targets = [[answer, tokenizer.eos_token_id] for answer in self.answers]

    def make(self, indices: np.ndarray, generator: np.random.Generator) -> Batch:
        sources = [self.sources[index] for index in indices]
        if self.train and self.options.noise:
            noisy = [noise_text(self.texts[index], generator, self.options.noise) for index in indices]
            sources = reviews_as_prompts(self.tokenizer, noisy, self.run.encoder_tokens)
        positive = torch.from_numpy(self.positive[indices]).float()
        batch = self.pack(sources, [self.targets[int(share > 0.5)] for share in positive])
        if self.run.head == "classification":
            batch["labels"] = torch.stack([1 - positive, positive], dim=1) if self.train else positive.long()
        elif self.train:
            batch["first_shares"] = torch.zeros(len(indices), len(self.tokenizer))
            batch["first_shares"][:, self.answers] = torch.stack([1 - positive, positive], dim=1)
        return batch


class MimicTask(Task):
    """A text to the standardized states of a sentence encoder (`gemini.model.training.states`)."""

    name = "mimic"

    def __init__(
        self, tokenizer: Any, options: TaskOptions, run: TrainingOptions, corpus: Corpus, train: bool
    ) -> None:
        texts, self.states = corpus.thoughts
        _require(len(texts), "texts with states", "gemini-edge train mimic")
        self.sources = reviews_as_prompts(tokenizer, texts, run.encoder_tokens)
        super().__init__(tokenizer, options, run, [len(ids) for ids in self.sources], train)

    def make(self, indices: np.ndarray, generator: np.random.Generator) -> Batch:
        ids, mask = pad([self.sources[index] for index in indices], self.tokenizer.pad_token_id)
        labels = torch.from_numpy(self.states[indices].astype(np.float32))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def build_tasks(tokenizer: Any, run: TrainingOptions, corpus: Corpus, *, train: bool) -> list[Task]:
    """The tasks of a recipe over one split."""
    prose = [*corpus.stories, *corpus.texts]
    told = prose if train or not corpus.stories else corpus.stories  # the perplexity is that of stories alone
    makers: dict[str, Callable[[TaskOptions], Task]] = {
        "caption": lambda task: CaptionTask(tokenizer, task, run, corpus, train),
        "continue": lambda task: ContinueTask(tokenizer, task, run, told, train),
        "denoise": lambda task: DenoiseTask(
            tokenizer, task, run, [*prose, *(review.text for review in corpus.reviews)], train
        ),
        "classify": lambda task: ClassifyTask(tokenizer, task, run, corpus.reviews, train),
        "mimic": lambda task: MimicTask(tokenizer, task, run, corpus, train),
        "name": lambda task: NameTask(task, run, corpus, train),
    }
    return [makers[name](task) for name, task in run.tasks.items()]


def read_teacher(path: Path) -> dict[str, float]:
    """Text -> probability that it is positive, from JSON Lines of {"text", "positive"}."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {str(row["text"]): min(1.0, max(0.0, float(row["positive"]))) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The soft labels {path} cannot be read ({type(error).__name__}: {error}).",
            'Write one {"text": ..., "positive": 0.9} a line.',
        ) from error


def reviews_as_prompts(tokenizer: Any, texts: Sequence[str], longest: int) -> list[list[int]]:
    """The encoder's tokens for each review, as many as a recipe lets it read."""
    return [both_ends(ids, longest) for ids in encode(tokenizer, [classify_prompt(text) for text in texts])]


def both_ends(ids: list[int], longest: int) -> list[int]:
    """The first and the last half of what may be read: what somebody thinks stands at either end.

    Sun et al., "How to Fine-Tune BERT for Text Classification?", CCL 2019, section 5.3.1.
    """
    return ids if len(ids) <= longest else ids[: longest // 2] + ids[longest // 2 - longest :]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, nothing added."""
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 (B, longest) filled up with ``value`` on the right, and 1 where a token is."""
    padded = np.full((len(rows), max(map(len, rows))), value, np.int64)
    mask = np.zeros(padded.shape, np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


def infill(
    ids: Sequence[int], mask: int, generator: np.random.Generator, *, share: float = 0.3, mean: float = 3.0
) -> list[int]:
    """``ids`` with spans of Poisson(``mean``) tokens, ``share`` of all, each replaced by one ``mask``."""
    hidden = np.zeros(len(ids), bool)
    wanted = max(1, round(share * len(ids)))
    while hidden.sum() < wanted:
        start = generator.integers(len(ids))
        hidden[start : start + max(1, generator.poisson(mean))] = True
    first = hidden & ~np.concatenate([[False], hidden[:-1]])
    return [
        mask if opens else token
        for token, gone, opens in zip(ids, hidden, first, strict=True)
        if opens or not gone
    ]


def _require(count: int, what: str, verb: str) -> None:
    if not count:
        raise DataError(f"There are no {what} to train on.", f"Make them with `{verb}`.")
