"""How closely a compressed embedder or classifier follows the fp32 model on the same examples."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemini.benchmarks.divergence import kl_divergence
from gemini.errors import VerificationError


@dataclass(frozen=True)
class EmbedderScore:
    """Embeddings against the fp32 model's: cosine of each sentence, share of equal nearest neighbours."""

    cosine_mean: float
    cosine_min: float
    neighbour_agreement: float | None
    sentences: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def score_embedder(embeddings: ArrayLike, reference: ArrayLike) -> EmbedderScore:
    """Compare embeddings (n, dim) of the same sentences; a zero vector has cosine 0 to everything.

    The neighbour is the other sentence of highest cosine; its agreement is None below three sentences.
    """
    ours, theirs = _unit_rows(embeddings), _unit_rows(reference)
    if ours.shape != theirs.shape or not len(ours):
        raise ValueError(f"embeddings {ours.shape}, reference {theirs.shape}")
    cosine = (ours * theirs).sum(axis=1)
    if not np.isfinite(cosine).all():
        raise VerificationError("The embeddings are not numbers.", "Use a recipe with more bits.")
    count = len(ours)
    agreement = float((_nearest(ours) == _nearest(theirs)).mean()) if count > 2 else None
    return EmbedderScore(float(cosine.mean()), float(cosine.min()), agreement, count)


def _unit_rows(vectors: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(vectors, dtype=np.float64)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float64] = rows / np.where(norm > 0, norm, 1.0)
    return unit


def _nearest(rows: NDArray[np.float64], block: int = 512) -> NDArray[np.int64]:
    """Index of each row's nearest other row; blockwise, so that n sentences do not cost n x n at once."""
    nearest = np.empty(len(rows), dtype=np.int64)
    for start in range(0, len(rows), block):
        similarity = rows[start : start + block] @ rows.T
        own = np.arange(len(similarity))
        similarity[own, own + start] = -np.inf
        nearest[start : start + block] = similarity.argmax(axis=1)
    return nearest


@dataclass(frozen=True)
class ClassifierScore:
    """Classifier logits against the fp32 model's.

    agreement: share of equal decisions (None for regression). kl: nats per example. accuracy: only with
    labels. logit_difference: largest absolute difference of any logit.
    """

    agreement: float | None
    kl: float | None
    accuracy: float | None
    logit_difference: float
    examples: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def score_classifier(
    logits: ArrayLike,
    reference_logits: ArrayLike,
    labels: ArrayLike | None = None,
    problem: str = "single_label",
) -> ClassifierScore:
    """Compare logits (n, labels) of the same examples.

    labels: (n,) class indices, or (n, labels) zeros and ones for "multi_label", where each label is its own
    decision at probability 0.5 and KL is summed over them. "regression" compares values only.
    """
    ours, theirs = np.asarray(logits, dtype=np.float64), np.asarray(reference_logits, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 2 or not len(ours):
        raise ValueError(f"logits {ours.shape}, reference {theirs.shape}")
    if not np.isfinite(ours).all():
        raise VerificationError("The classifier's logits are not numbers.", "Use a recipe with more bits.")
    difference, count = float(np.abs(ours - theirs).max()), len(ours)
    if problem == "regression":
        return ClassifierScore(None, None, None, difference, count)
    if problem == "multi_label":
        kl = kl_divergence(_with_zero(theirs), _with_zero(ours)).sum(axis=1)
        decided, expected = ours > 0, theirs > 0
    else:
        kl = kl_divergence(theirs, ours)
        decided, expected = ours.argmax(axis=1), theirs.argmax(axis=1)
    accuracy = None if labels is None else float((decided == np.asarray(labels)).mean())
    return ClassifierScore(float((decided == expected).mean()), float(kl.mean()), accuracy, difference, count)


def _with_zero(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, labels) -> (n, labels, 2): sigmoid(x) is softmax over (x, 0)."""
    return np.stack([logits, np.zeros_like(logits)], axis=-1)
