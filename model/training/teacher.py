"""Soft labels for English reviews, from a sentence encoder that knows more of the language.

    python -m gemini.model.training.teacher CACHE OUTPUT.jsonl

all-MiniLM-L6-v2 is frozen; a logistic regression over its states is fitted to the training split alone.
What it then labels are texts made from that split (crops, mixtures, losses: the transfer set of Tang et al.,
"Distilling Task-Specific Knowledge from BERT into Simple Neural Networks", arXiv:1903.12136) and words of its
own vocabulary, as far as it is sure of them. A review itself is labelled by a regression that did not see it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from gemini.model.catalog import find
from gemini.model.checkpoint import load_checkpoint
from gemini.model.data import load_sentiment
from gemini.model.data.noise import words_of
from gemini.model.training.order import step_seed
from gemini.model.training.state import write_atomically

ENCODER = "all-minilm-l6-v2"
VARIANTS = 6  # texts made from each review
SURE = 0.35  # how far from 1/2 the label of a bare word must be to be worth learning
FOLDS = 5
_SHORTEST_WORD = 3


def soft_labels(cache: Path, *, show: bool = False) -> tuple[list[dict[str, Any]], float]:
    """Rows {"text", "language", "positive"}, reviews first; and the teacher's percent right on valid."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    find(ENCODER)  # says which package is missing
    encoder = load_checkpoint(ENCODER)
    train, valid = (
        [review for review in load_sentiment(cache, split) if review.language == "en"]
        for split in ("train", "valid")
    )
    reviews = [review.text for review in train]
    bare = [f"It was {word}." for word in words(encoder.tokenizer)]
    made = [text for text in dict.fromkeys(variants(reviews)) if text not in set(reviews)]
    known, asked, further, single = (
        features(encoder, texts, show=show)
        for texts in (reviews, [review.text for review in valid], made, bare)
    )
    labels = [review.label for review in train]
    teacher = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    held_out = cross_val_predict(teacher, known, labels, cv=FOLDS, method="predict_proba")[:, 1]
    teacher.fit(known, labels)
    labelled = [
        *zip(reviews, held_out, strict=True),
        *zip(made, teacher.predict_proba(further)[:, 1], strict=True),
        *(
            (text, share)
            for text, share in zip(bare, teacher.predict_proba(single)[:, 1] if bare else (), strict=True)
            if abs(share - 0.5) > SURE
        ),
    ]
    rows = [{"text": text, "language": "en", "positive": round(float(share), 4)} for text, share in labelled]
    return rows, 100 * float(teacher.score(asked, [review.label for review in valid]))


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
            made.append("".join(word + (space or " ") for word, space in new[:64]).strip())
    return made


def words(tokenizer: Any) -> list[str]:
    """The whole words of a word-piece vocabulary, in its order."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [piece for piece in pieces if len(piece) >= _SHORTEST_WORD and piece.isascii() and piece.isalpha()]


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


def ensure_teacher(cache: Path, *, show: bool = False) -> Path:
    """The file of soft labels beside the data; made when there is none, which takes minutes."""
    path = cache / f"teacher-{ENCODER}.jsonl"
    if not path.exists():
        write_labels(path, cache, show=show)
    return path


def write_labels(path: Path, cache: Path, *, show: bool = False) -> dict[str, float]:
    """Make the file of soft labels; how many texts it has, and the teacher's percent right on valid."""
    rows, accuracy = soft_labels(cache, show=show)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return {"texts": len(rows), "valid_accuracy": accuracy}


if __name__ == "__main__":
    from gemini.model.offline import import_transformers

    import_transformers()
    print(json.dumps(write_labels(Path(sys.argv[2]), Path(sys.argv[1]), show=True)))
