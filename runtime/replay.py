"""Decode steps of a GPU, recorded once as a CUDA graph and replayed: one launch instead of some hundred.

A recording holds addresses, so what a step reads and writes lies at the same place in every replay: the
cache, the tokens, their lengths, the logits. Numbers that the host reads are recorded as they were, and there
is one: the total length, which is set to the capacity. The operator masks by the lengths on the device.
Source: onnxruntime's CUDA provider, options enable_cuda_graph and gpu_graph_id.
"""

from __future__ import annotations

import threading

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from gemini.runtime import kv
from gemini.runtime.providers import CUDA, RECORD
from gemini.runtime.schema import DecoderModel

KEPT = 4  # recordings that nobody uses
# Steps with the same buffers before one is recorded. Recording took 50 ms to 400 ms where a step that was not
# recorded took 2 ms longer than a replay (benchmarks/LOG.md): a single short answer is better off without.
STEPS_BEFORE = 64
_NEVER = "-1"  # the id of a run that is neither recorded nor replayed


def run_options(graph_id: str = _NEVER) -> ort.RunOptions:
    """Options of a run of a session that records; by default the run stays outside of it."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph_id)
    return options


def records(session: ort.InferenceSession) -> bool:
    """Whether a session was opened such that its runs can be recorded."""
    options = session.get_provider_options().get(CUDA, {})
    return any(options.get(name) == value for name, value in RECORD.items())


class Recording:
    """The buffers of one decode step of ``batch`` rows, on the device, bound for good."""

    def __init__(
        self,
        session: ort.InferenceSession,
        model: DecoderModel,
        batch: int,
        capacity: int,
        dtype: type[np.number],
        device: str,
        graph_id: int,
    ) -> None:
        self.batch, self.capacity = batch, capacity
        self.values = kv.allocate(model.layers, batch, capacity, device, dtype)
        self._ids = kv.to_device(np.zeros((batch, 1), np.int64), device)
        self._lengths = kv.to_device(np.zeros(batch, np.int32), device)
        self._logits = kv.to_device(np.zeros((batch, 1, model.vocab_size), np.float32), device)
        feeds = {
            "input_ids": self._ids,
            "seqlens_k": self._lengths,
            "logit_positions": kv.to_device(np.zeros((batch, 1), np.int64), device),
            "total_sequence_length": kv.to_device(np.array(capacity, np.int32), "cpu"),
        }
        self._session, self._options, self._unrecorded = session, run_options(str(graph_id)), run_options()
        self._binding = session.io_binding()
        known = {node.name for node in session.get_inputs()}
        for name, value in feeds.items():
            if name in known:
                self._binding.bind_ortvalue_input(name, value)
        for (past, present), value in zip(kv.cache_names(model.layers), self.values, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        self._binding.bind_ortvalue_output("logits", self._logits)
        self._held, self._steps = feeds, 0

    def step(self, tokens: NDArray[np.int64], lengths: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits (B, V), a new array, after one token (B,) a row; ``lengths`` (B,): what each row held
        before it."""
        self._ids.update_inplace(np.ascontiguousarray(tokens[:, None]))
        self._lengths.update_inplace(lengths)
        self._steps += 1
        options = self._options if self._steps > STEPS_BEFORE else self._unrecorded
        self._session.run_with_iobinding(self._binding, options)
        return np.asarray(self._logits.numpy()[:, 0])


class Recordings:
    """The recordings of a session, for batches to borrow: making one takes longer than many steps."""

    def __init__(self, session: ort.InferenceSession, device: str = "cuda") -> None:
        self.lock = threading.Lock()  # a session that records runs one batch at a time
        self._session, self._device = session, device
        self._free: list[Recording] = []
        self._made = 0

    def take(self, model: DecoderModel, batch: int, capacity: int, dtype: type[np.number]) -> Recording:
        """A recording for so many rows and tokens that nobody uses."""
        with self.lock:
            for recording in self._free:
                if (recording.batch, recording.capacity) == (batch, capacity):
                    self._free.remove(recording)
                    return recording
            self._made += 1
            return Recording(self._session, model, batch, capacity, dtype, self._device, self._made)

    def give_back(self, recording: Recording) -> None:
        """Nobody uses it any more. The last few are kept, caches and all."""
        with self.lock:
            self._free = [*self._free, recording][-KEPT:]


def round_up(tokens: int, limit: int) -> int:
    """Room for ``tokens``: a power of two, so that few recordings serve all, and at most ``limit``."""
    return max(tokens, min(max(kv.BLOCK, 1 << (tokens - 1).bit_length()), limit))
