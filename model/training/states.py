"""What a sentence encoder thinks of texts: targets for a small encoder that learns to think the same.

    texts, states = read_states(ensure_states(cache), "train")

all-MiniLM-L6-v2 is frozen. The texts are the English reviews of the training split, others made from them
(crops, mixtures, losses: the transfer set of Tang et al., "Distilling Task-Specific Knowledge from BERT into
Simple Neural Networks", arXiv:1903.12136; words swapped for related ones: TinyBERT, Jiao et al.,
arXiv:1909.10351, Algorithm 1), words of the encoder's vocabulary and sentences of the stories. The states are
those of three layers, as in TinyBERT, here their means over a text.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from functools import cache as memoized
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from gemini.errors import DataError
from gemini.model.catalog import find
from gemini.model.checkpoint import load_checkpoint
from gemini.model.data import load_sentiment, load_stories
from gemini.model.data.noise import is_han, words_of
from gemini.model.training.order import step_seed
from gemini.model.training.state import write_atomically

ENCODER = "all-minilm-l6-v2"
VARIANTS = 6  # texts made from each review
SWAPPED = 8  # and with other words
RELATED = 15  # words that one may be swapped for
SENTENCES = 6000
_SHORTEST_WORD = 3
_WORD = re.compile(r"(?<![\w'])[A-Za-z]+(?![\w'])")
_HELD_OUT = 50  # one text in so many is for validation, another for test


def states_path(cache: Path) -> Path:
    """The file beside the data."""
    return cache / f"states-{ENCODER}.npz"


def ensure_states(cache: Path, *, show: bool = False) -> Path:
    """The file of texts and states; made when there is none, which takes minutes.

    It holds ``texts`` (JSON in UTF-8), of which the first ``reviews`` are reviews and those up to ``made``
    were made from them, ``states`` float16 (N, 3 D), and the ``mean`` and ``deviation`` over the reviews that
    they were standardized with.
    """
    path = states_path(cache)
    if path.exists():
        return path
    find(ENCODER)  # says which package is missing
    encoder = load_checkpoint(ENCODER)
    reviews = [review.text for review in load_sentiment(cache, "train", "en")]
    made = [*variants(reviews), *swapped(reviews, encoder)]
    parts = [reviews, made, bare_words(encoder.tokenizer), _sentences(cache)]
    texts = list(dict.fromkeys(text for part in parts for text in part))
    raw = features(encoder, texts, show=show)
    count = len(set(reviews))
    mean, deviation = raw[:count].mean(0), raw[:count].std(0).clip(1e-2)
    arrays = {
        "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
        "reviews": np.array(count),
        "made": np.array(len({*reviews, *made})),
        "states": ((raw - mean) / deviation).astype(np.float16),
        "mean": mean,
        "deviation": deviation,
    }
    with io.BytesIO() as file:
        np.savez(file, **arrays)
        write_atomically(path, file.getvalue())
    return path


def load_arrays(path: Path) -> tuple[list[str], dict[str, NDArray[Any]]]:
    """The texts and the other arrays of such a file; DataError when it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
        return json.loads(arrays.pop("texts").tobytes()), arrays
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(
            f"{path} is missing or damaged ({error}).", "Delete it; training makes it again."
        ) from error


def read_states(path: Path, split: str) -> tuple[list[str], NDArray[np.float16]]:
    """Texts and their states (N, 3 D) of "train", "valid" or "test"."""
    texts, arrays = load_arrays(path)
    place = {"valid": 0, "test": 1}.get(split)
    number = np.arange(len(texts)) % _HELD_OUT
    chosen = np.flatnonzero(number > 1 if place is None else number == place)
    return [texts[index] for index in chosen], arrays["states"][chosen]


def _sentences(cache: Path) -> list[str]:
    """Some of the stories' sentences, as far as there are stories."""
    stories = load_stories(cache, "train") if (cache / "stories.jsonl").is_file() else []
    found = [sentence.strip() for story in stories for sentence in re.findall(r"[^.!?]+[.!?]", story)]
    return [found[index] for index in np.random.default_rng(0).permutation(len(found))[:SENTENCES]]


def variants(texts: Sequence[str], count: int = VARIANTS) -> list[str]:
    """``count`` texts made from each: a crop, parts of two texts joined, or some words lost."""
    made = []
    split = [words_of(text) for text in texts]
    for number, own in enumerate(split):
        generator = np.random.default_rng(step_seed(0, "variants", number))
        for kind in generator.integers(3, size=count):
            if kind == 0:
                length = int(generator.integers(1, max(2, min(8, len(own)))))
                start = int(generator.integers(max(1, len(own) - length)))
                new = own[start : start + length]
            elif kind == 1:
                other = split[int(generator.integers(len(split)))]
                new = own[: int(generator.integers(1, len(own) + 1))]
                new = new + other[int(generator.integers(len(other))) :]
            else:
                new = [word for word in own if generator.random() > 0.25] or own
            made.append("".join(word + (space or _gap(word)) for word, space in new[:64]).strip())
    return made


def swapped(texts: Sequence[str], encoder: Any, count: int = SWAPPED) -> list[str]:
    """``count`` texts made from each: some words, 15 to 50 % of them, swapped for related ones."""
    related = related_words(encoder)
    made = []
    for number, text in enumerate(texts):
        generator = np.random.default_rng(step_seed(0, "swapped", number))
        shares = generator.uniform(0.15, 0.5, size=count)
        made += [_swap(text, share, related, generator) for share in shares]
    return made


def _swap(
    text: str, share: float, related: Callable[[str], list[str]], generator: np.random.Generator
) -> str:
    def other(found: re.Match[str]) -> str:
        word = found[0]
        others = related(word.lower()) if generator.random() < share else []
        if not others:
            return word
        new = others[int(generator.integers(len(others)))]
        return new.upper() if word.isupper() else new.title() if word.istitle() else new

    return _WORD.sub(other, text)


def related_words(encoder: Any) -> Callable[[str], list[str]]:
    """The words whose vectors in the encoder are nearest to a word's, by cosine; none if it has none."""
    numbered = whole_words(encoder.tokenizer)
    words = list(numbered)
    places = {word: place for place, word in enumerate(words)}
    vectors = encoder.model.get_input_embeddings().weight.detach()[list(numbered.values())]
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)

    @memoized
    def related(word: str) -> list[str]:
        if word not in places:
            return []
        likeness = vectors @ vectors[places[word]]
        likeness[places[word]] = -1
        return [words[place] for place in likeness.topk(RELATED).indices.tolist()]

    return related


def _gap(word: str) -> str:
    """What parts a word from one that did not follow it: nothing after a Chinese character."""
    return "" if is_han(word) else " "


def bare_words(tokenizer: Any) -> list[str]:
    """The whole words of a word-piece vocabulary, in its order, each as a review of one word."""
    return [f"It was {word}." for word in whole_words(tokenizer)]


def whole_words(tokenizer: Any) -> dict[str, int]:
    """The pieces of a word-piece vocabulary that are English words, in its order, and their numbers."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return {
        piece: number
        for number, piece in enumerate(pieces)
        if len(piece) >= _SHORTEST_WORD and piece.isascii() and piece.isalpha()
    }


@torch.inference_mode()
def features(
    encoder: Any, texts: Sequence[str], *, batch: int = 64, show: bool = False
) -> NDArray[np.float32]:
    """(N, 3 D): the mean states of the middle, the second third and the last layer."""
    model = encoder.model.eval()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    result: NDArray[np.float32] = np.empty((0, 0), np.float32)
    for start in tqdm(range(0, len(order), batch), desc="teacher", unit="batch", disable=not show):
        rows = order[start : start + batch]
        inputs = encoder.tokenizer(
            [texts[row] for row in rows], return_tensors="pt", padding=True, truncation=True, max_length=128
        )
        states = model(**inputs, output_hidden_states=True).hidden_states
        depth, mask = len(states) - 1, inputs["attention_mask"][..., None].float()
        means = [(states[at] * mask).sum(1) / mask.sum(1) for at in (depth, 2 * depth // 3, depth // 2)]
        part = torch.cat(means, dim=1).float().numpy()
        if not len(result):
            result = np.empty((len(texts), part.shape[1]), np.float32)
        result[rows] = part
    return result
