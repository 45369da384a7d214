"""Log-softmax and Kullback-Leibler divergence that do not lose digits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]


def log_softmax(logits: FloatArray) -> FloatArray:
    """log softmax over the last axis in the input's precision; exponentials are summed in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(shifted.dtype)
    return shifted


def kl_divergence(reference: FloatArray, logits: FloatArray) -> NDArray[np.float64]:
    """KL(softmax(reference) || softmax(logits)) in nats over the last axis; never negative."""
    expected, actual = log_softmax(reference), log_softmax(logits)
    weight = np.exp(expected)
    # A token the reference rules out adds nothing, even where the student's log-probability is -inf.
    gap = np.subtract(expected, actual, out=np.zeros_like(weight), where=weight > 0)
    divergence: NDArray[np.float64] = (weight * gap).sum(axis=-1, dtype=np.float64)
    return np.maximum(divergence, 0.0)  # rounding may leave -1e-8
