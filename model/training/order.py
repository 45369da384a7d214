"""Which examples a step sees: a pure function of (seed, task, step), so a resumed run sees the same ones.

Every epoch visits a fresh permutation. Examples of similar length share a batch, because a padded token costs
as much as a real one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

_POOL = 16  # batches sorted together: long enough to group lengths, short enough to stay random


def step_seed(seed: int, name: str, step: int) -> int:
    """A 63-bit seed for what is random about ``name`` at ``step``; independent of every other such pair."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(name.encode()), step])
    return int(entropy.generate_state(1, np.uint64)[0] >> 1)


class Order:
    """Batches of indices into a list of examples, given by their lengths."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, name: str) -> None:
        self.lengths = np.asarray(lengths)
        self.batch = batch
        self.seed = seed
        self.name = name
        self.per_epoch = max(1, len(self.lengths) // batch)
        self._epoch, self._batches = -1, np.empty((0, batch), np.int64)

    def indices(self, step: int) -> np.ndarray:
        """int64 (batch,): the examples of that step; a set smaller than a batch is repeated to fill it."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return self._batches[index]

    def _shuffle(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng(step_seed(self.seed, f"{self.name}/order", epoch))
        count = self.per_epoch * self.batch
        drawn = np.resize(generator.permutation(len(self.lengths)), count)
        pools = [drawn[start : start + _POOL * self.batch] for start in range(0, count, _POOL * self.batch)]
        pools = [pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools]
        return generator.permutation(np.concatenate(pools).reshape(self.per_epoch, self.batch))
