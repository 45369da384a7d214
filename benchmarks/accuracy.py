"""What compression costs in accuracy: perplexity, KL and agreement against the fp32 model.

Models come in as callables on numpy arrays, so the same code scores torch, onnxruntime and anything else.
The teacher's logits are kept on disk, so the fp32 and the compressed model are never in memory together.
"""

import errno
import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gemini.benchmarks.agreement import ClassifierScore, EmbedderScore, score_classifier, score_embedder
from gemini.benchmarks.divergence import FloatArray, kl_divergence
from gemini.errors import UsageError, VerificationError
from gemini.runtime.threads import usable_threads

__all__ = [
    "ClassifierScore",
    "EmbedderScore",
    "GeneratorScore",
    "Teacher",
    "record_teacher",
    "score_classifier",
    "score_embedder",
    "score_generator",
]

Logits = Callable[[NDArray[np.int64]], NDArray[np.float32]]
_CHUNK_BYTES = 8 << 20  # one float32 block of logits; about five such blocks a core are alive at once
T = TypeVar("T")
_FLOOR = -60000.0  # float16 ends at -65504; exp of either is 0


@dataclass(frozen=True)
class GeneratorScore:
    """Next-token quality over ``tokens`` predicted tokens.

    perplexity: exp(mean negative log-likelihood, nats). kl: mean KL(teacher || student) in nats per token.
    top1_agreement: share of positions where both rank the same token first. Both are None without a teacher.
    """

    perplexity: float
    kl: float | None
    top1_agreement: float | None
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Teacher:
    """Recorded logits of the reference model: float16, less each row's maximum, all windows in one file.

    Subtracting the maximum leaves the softmax alone and puts float16's resolution where the probability is.
    """

    path: Path
    vocab_size: int
    offsets: tuple[int, ...]
    digests: tuple[str, ...]

    def rows(self, window: int, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a window, (stop - start, vocab) float32; read, not mapped, to keep resident memory flat."""
        skip = (self.offsets[window] + start) * self.vocab_size
        count = (stop - start) * self.vocab_size
        data = np.fromfile(self.path, dtype=np.float16, count=count, offset=skip * 2)
        return data.reshape(stop - start, self.vocab_size).astype(np.float32)

    def close(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def record_teacher(
    logits_of: Logits, windows: Sequence[NDArray[np.int64]], folder: str | Path
) -> tuple[Teacher, GeneratorScore]:
    """Run the reference model over the windows and keep its logits in ``folder`` (2 bytes each).

    logits_of: ids (1, S) int64 -> logits (1, S, V). Raises UsageError when the disk is full.
    """
    path = Path(folder) / "teacher.f16"
    total, tokens, vocab, offsets = 0.0, 0, 0, [0]
    try:
        with path.open("wb") as file:
            for ids in windows:
                logits, targets = _predictions(logits_of, ids)
                vocab = logits.shape[1]
                for start, stop in _chunks(logits):
                    rows = logits[start:stop].astype(np.float32)
                    total += _nll(rows, targets[start:stop])
                    rows -= rows.max(axis=1, keepdims=True)
                    file.write(np.maximum(rows, _FLOOR, out=rows).astype(np.float16).data)
                tokens += len(targets)
                offsets.append(offsets[-1] + len(targets))
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UsageError(
            f"There is no room in {path.parent} for the reference logits.",
            "Free some space, set TMPDIR, or use a shorter evaluation text.",
        ) from error
    teacher = Teacher(path, vocab, tuple(offsets), tuple(_digest(ids) for ids in windows))
    return teacher, GeneratorScore(_perplexity(total, tokens), 0.0, 1.0, tokens)


def score_generator(
    logits_of: Logits, windows: Sequence[NDArray[np.int64]], teacher: Teacher | None = None
) -> GeneratorScore:
    """Score next-token predictions over the windows; position t predicts token t + 1.

    logits_of: ids (1, S) int64 -> logits (1, S, V), or those of fewer positions, the last. Raises
    VerificationError if any logit is not a number.
    """
    if teacher is not None and teacher.digests != tuple(_digest(ids) for ids in windows):
        raise ValueError("the teacher was recorded on other windows")
    total, divergence, agree, tokens = 0.0, 0.0, 0, 0
    for index, ids in enumerate(windows):
        logits, targets = _predictions(logits_of, ids)
        if teacher is not None and logits.shape[1] != teacher.vocab_size:
            raise ValueError(f"vocabulary {logits.shape[1]}, teacher has {teacher.vocab_size}")
        for loss, apart, same in _each_chunk(partial(_score, logits, targets, teacher, index), logits):
            total, divergence, agree = total + loss, divergence + apart, agree + same
        tokens += len(targets)
    if teacher is None:
        return GeneratorScore(_perplexity(total, tokens), None, None, tokens)
    return GeneratorScore(_perplexity(total, tokens), divergence / tokens, agree / tokens, tokens)


def _score(
    logits: FloatArray,
    targets: NDArray[np.int64],
    teacher: Teacher | None,
    window: int,
    start: int,
    stop: int,
) -> tuple[float, float, int]:
    """Summed negative log-likelihood and divergence of some positions, and at how many the best agree."""
    rows = logits[start:stop].astype(np.float32)
    loss = _nll(rows, targets[start:stop])
    if teacher is None:
        return loss, 0.0, 0
    reference = teacher.rows(window, start, stop)
    same = int((reference.argmax(axis=1) == rows.argmax(axis=1)).sum())
    return loss, float(kl_divergence(reference, rows).sum()), same


def _predictions(logits_of: Logits, ids: NDArray[np.int64]) -> tuple[FloatArray, NDArray[np.int64]]:
    """Logits (n - 1, V) that have a target, and the targets (n - 1,), of the last n <= S positions."""
    logits = np.asarray(logits_of(ids))
    if logits.ndim != 3 or logits.shape[1] > ids.shape[1] or logits.shape[0] != 1 or ids.shape[0] != 1:
        raise ValueError(f"logits {logits.shape} for ids {ids.shape}, expected (1, S, V)")
    return logits[0, :-1], ids[0, ids.shape[1] - logits.shape[1] + 1 :]


def _each_chunk(work: Callable[[int, int], T], logits: FloatArray) -> list[T]:
    """What ``work(start, stop)`` returns for chunks of positions, in their order; as many at once as there
    are cores, since numpy lets go of the interpreter's lock."""
    with ThreadPoolExecutor(usable_threads()) as pool:
        return list(pool.map(lambda chunk: work(*chunk), _chunks(logits)))


def _chunks(logits: FloatArray) -> list[tuple[int, int]]:
    step = max(1, _CHUNK_BYTES // (4 * logits.shape[1]))
    return [(start, min(start + step, len(logits))) for start in range(0, len(logits), step)]


def _nll(rows: FloatArray, targets: NDArray[np.int64]) -> float:
    """Summed negative log-likelihood of the targets, nats."""
    top = rows.max(axis=1)
    total = np.log(np.exp(rows - top[:, None]).sum(axis=1, dtype=np.float64))
    loss = float((total + top - rows[np.arange(len(rows)), targets]).sum(dtype=np.float64))
    if math.isnan(loss):
        raise VerificationError(
            "The model's logits are not numbers.",
            "Use a recipe with more bits or skip the layers that overflow.",
        )
    return loss


def _perplexity(total: float, tokens: int) -> float:
    if tokens == 0:
        raise UsageError("There is no token to score.", "Give a longer text.")
    mean = total / tokens
    return math.exp(mean) if mean < 700 else math.inf


def _digest(ids: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids, dtype=np.int64).tobytes()).hexdigest()
