"""The model half of text generation: one running batch with its key/value cache, bound once with IOBinding.

    decoder = Decoder(graph, model, new_tokens=32)
    logits = decoder.prefill([[1, 5, 9], [1, 7]])     # (2, V): the next token's logits of each row
    logits = decoder.step(logits.argmax(-1))          # (2, V)

Every buffer that a step touches is allocated at prefill. On the CPU the OrtValues share the memory of numpy
arrays, so a step writes a few integers, runs, and reads its logits in place.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import ArrayLike, NDArray

from gemini.errors import RequestError
from gemini.runtime import kv, replay
from gemini.runtime.checks import LENGTH_INPUTS, cache_dtype, checked_row, checked_rows
from gemini.runtime.prefixes import Prefix, PrefixCache
from gemini.runtime.replay import Recording
from gemini.runtime.schema import DecoderModel
from gemini.runtime.session import Graph, run_bound, run_failed

# A longer prompt of one row is read in pieces, so that activations need memory for so many tokens only: as
# fast as in one call, with a third of the memory (benchmarks/LOG.md). GroupQueryAttention takes several new
# tokens over a past for one row only, so a batch is read at once. A GPU needs more tokens to be busy.
CHUNK = {"cpu": 256, "cuda": 4096}


class Decoder:
    """A batch in flight. Not for two threads at once; open one Decoder a batch, they share the session."""

    def __init__(
        self,
        graph: Graph,
        model: DecoderModel,
        new_tokens: int = 0,
        constants: Mapping[str, ort.OrtValue] | None = None,
        suppressed: Sequence[int] = (),
        prefixes: PrefixCache | None = None,
    ) -> None:
        """``constants``: further inputs, the same in every call; ``suppressed``: tokens never chosen.

        ``prefixes``: what a single row begins from, and what is kept of it at its end.
        """
        self._graph, self._model, self._new_tokens = graph, model, new_tokens
        self.context_length = model.context_length
        self._constants, self._suppressed = dict(constants or {}), list(suppressed)
        self._names = kv.cache_names(model.layers)
        self._recordings = graph.recordings if model.cache == "shared" and not self._constants else None
        self._recording: Recording | None = None  # whose buffers the cache is then
        self._values: list[ort.OrtValue] = []
        self._arrays: dict[str, np.ndarray] = {}
        self._feeds: dict[str, ort.OrtValue] = {}
        self._several = np.zeros((0, model.vocab_size), np.float32)  # logits of the widest call so far
        self._capacity = 0
        self._lengths = np.zeros(0, np.int32)
        self._prefixes = prefixes if model.cache == "shared" else None
        self._tokens = np.zeros(0, np.int64)  # of the only row, where prefixes are kept
        self._whole = False  # whether the cache holds what the lengths say: a call may have failed

    def prefill(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Start a batch from prompts of any lengths; returns the last token's logits (B, V) of each row.

        RequestError for empty prompts, ids outside the vocabulary and prompts over the context length. The
        result is a view that the next call overwrites.
        """
        rows = checked_rows(ids, self._model)
        lengths = np.array([row.size for row in rows], np.int32)
        width = int(lengths.max())
        if self._model.cache == "concat" and (lengths != width).any():
            raise RequestError(
                "This model needs prompts of equal length in one batch.", "Run the prompts one by one."
            )
        padded = np.zeros((len(rows), width), np.int64)
        for row, tokens in enumerate(rows):
            padded[row, : tokens.size] = tokens
        try:
            self._start(len(rows), width)
        except MemoryError as error:
            raise kv.too_large(len(rows), width + self._new_tokens) from error
        if len(rows) == 1 and self._model.cache == "shared":
            return self._prefill_row(rows[0])
        self._lengths = lengths
        self._arrays["seqlens_k"][:] = lengths - 1
        self._arrays["total_sequence_length"][...] = width
        self._arrays["logit_positions"][:, 0] = lengths - 1
        self._binding.bind_ortvalue_input("input_ids", kv.to_device(padded, self._graph.device))
        logits = self._run()
        self._arrays["logit_positions"][:] = 0
        self._binding.bind_ortvalue_input("input_ids", self._feeds["input_ids"])
        return logits

    def _prefill_row(self, row: NDArray[np.int64]) -> NDArray[np.float32]:
        """Prefill of one row, from what is known of it, CHUNK tokens a call."""
        done = self._begin_from_prefix(row)
        self._lengths = np.array([done], np.int32)
        size = CHUNK[self._graph.device]
        for start in range(done, row.size, size):
            chunk = row[start : start + size]
            self._advance(chunk)
            self._arrays["logit_positions"][:] = chunk.size - 1
            self._binding.bind_ortvalue_input("input_ids", kv.to_device(chunk[None], self._graph.device))
            logits = self._run()
        self._arrays["logit_positions"][:] = 0
        self._binding.bind_ortvalue_input("input_ids", self._feeds["input_ids"])
        return logits

    def step(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Append one token to each row; returns the next logits (B, V), a view like prefill's."""
        chosen = checked_row(tokens, self._model.vocab_size)
        if chosen.shape != self._lengths.shape or not self._feeds:
            raise RequestError(
                f"A step got {chosen.size} tokens for {self._lengths.size} rows.",
                "Prefill, then one token a row.",
            )
        self._advance(chosen)
        if self._recording is not None:
            return self._replay(chosen)
        self._arrays["input_ids"][:, 0] = chosen
        return self._run(step=True)

    def extend(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Append M tokens to the only row; the logits (M, V) after each of them, a view like prefill's.

        GroupQueryAttention takes several new tokens over a past for one row only.
        """
        chosen = checked_row(tokens, self._model.vocab_size)
        if chosen.size == 1:
            return self.step(chosen)
        if self._lengths.size != 1 or not self._feeds:
            raise RequestError(
                f"Several tokens were to follow {self._lengths.size} rows.", "Prefill a single prompt."
            )
        self._advance(chosen)
        if len(self._several) < chosen.size:
            self._several = np.zeros((chosen.size, self._model.vocab_size), np.float32)
        logits = self._several[: chosen.size]
        positions = np.arange(chosen.size)[None]
        arrays: dict[str, np.ndarray] = {
            "input_ids": chosen[None],
            "logit_positions": positions,
            "logits": logits[None],
        }
        single = self._feeds
        try:
            self._feeds = single | {name: kv.to_device(array, "cpu") for name, array in arrays.items()}
            self._bind_step_inputs(("input_ids", "logit_positions"))
            self._binding.bind_ortvalue_output("logits", self._feeds["logits"])
            self._run(step=True)
        finally:
            self._feeds = single
            self._bind_step_inputs(("input_ids", "logit_positions"))
            self._binding.bind_ortvalue_output("logits", single["logits"])
        return self._suppress(logits)

    def rewind(self, count: int) -> None:
        """Forget the last ``count`` tokens of the only row. A shared buffer just gets overwritten later."""
        if self._lengths.size != 1 or not 0 <= count < self._lengths[0]:
            raise RequestError(
                f"{count} tokens cannot be taken back.", "Take back fewer, of a single row, after a prefill."
            )
        self._lengths = self._lengths - count
        if count and self._model.cache != "shared":
            kept = [np.ascontiguousarray(value.numpy()[:, :, :-count]) for value in self._values]
            self._values = [kv.to_device(value, self._graph.device) for value in kept]
            self._bind_cache()

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Let row i go on from what is row ``rows[i]`` now; int64 (B,)."""
        if (rows == np.arange(rows.size)).all():
            return
        self._lengths = self._lengths[rows]
        for index, value in enumerate(self._values):
            chosen = np.ascontiguousarray(value.numpy()[rows])
            if self._model.cache == "shared":
                value.update_inplace(chosen)
            else:
                self._values[index] = kv.to_device(chosen, self._graph.device)
        if self._model.cache != "shared":
            self._bind_cache()

    def memory(self) -> dict[str, int]:
        """Bytes: "kv_cache" allocated (that over an encoder included), "kv_used" of it, step "buffers"."""
        held = [value.tensor_size_in_bytes() for value in (*self._values, *self._constants.values())]
        length = self._capacity or int(self._lengths.max(initial=1))
        share = float(self._lengths.mean()) / length if self._lengths.size else 1.0
        used = [round(size * share) for size in held[: len(self._values)]]
        return {
            "kv_cache": sum(held),
            "kv_used": sum(used) + sum(held[len(used) :]),
            "buffers": sum(array.nbytes for array in (*self._arrays.values(), self._several)),
        }

    def close(self) -> None:
        """Free all buffers; a new prefill allocates them again."""
        self._keep_prefix()
        self._return_recording()
        self._values, self._arrays, self._feeds, self._capacity = [], {}, {}, 0
        self._lengths, self._several = np.zeros(0, np.int32), self._several[:0].copy()
        if hasattr(self, "_binding"):
            del self._binding

    def _start(self, batch: int, width: int) -> None:
        planned = min(width + self._new_tokens, self._model.context_length)
        self._values, self._capacity = self._cache(batch, planned)
        self._arrays = {
            "input_ids": np.zeros((batch, 1), np.int64),
            "seqlens_k": np.zeros(batch, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "logit_positions": np.zeros((batch, 1), np.int64),
            "logits": np.zeros((batch, 1, self._model.vocab_size), np.float32),
        }
        # Step inputs and logits stay in host memory on every device: they are a few bytes in, one row out.
        self._feeds = {name: kv.to_device(array, "cpu") for name, array in self._arrays.items()}
        self._binding = self._graph.session.io_binding()
        self._bind_step_inputs()
        for name, value in self._constants.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output("logits", self._feeds["logits"])
        self._bind_cache()

    def _cache(self, batch: int, planned: int) -> tuple[list[ort.OrtValue], int]:
        """Buffers of keys and values for so many tokens at least, and for how many."""
        self._return_recording()
        limit, dtype = self._model.context_length, cache_dtype(self._graph)
        if self._recordings is not None:
            room = replay.round_up(planned, limit)
            self._recording = self._recordings.take(self._model, batch, room, dtype)
            return self._recording.values, room
        room = kv.round_up(planned, limit) if self._model.cache == "shared" else 0
        return kv.allocate(self._model.layers, batch, room, self._graph.device, dtype), room

    def _return_recording(self) -> None:
        if self._recordings is not None and self._recording is not None:
            self._recordings.give_back(self._recording)
        self._recording = None

    def _bind_step_inputs(self, names: Sequence[str] = ("logit_positions", *LENGTH_INPUTS)) -> None:
        for name in names:
            if name in self._graph.inputs:
                self._binding.bind_ortvalue_input(name, self._feeds[name])

    def _bind_cache(self) -> None:
        """Shared: each buffer is past and present at once. Concat: each present is allocated anew."""
        for (past, present), value in zip(self._names, self._values, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            if self._model.cache == "shared":
                self._binding.bind_ortvalue_output(present, value)
            else:
                self._binding.bind_output(present, self._graph.device, 0)

    def _advance(self, tokens: NDArray[np.int64]) -> None:
        """Make room for one more token a row, or for several of the only row, and say so to the graph."""
        count = tokens.size // self._lengths.size
        total = int(self._lengths.max()) + count
        if total > self._model.context_length:
            raise RequestError(
                f"The context of {self._model.context_length} tokens is full.", "Generate fewer tokens."
            )
        if self._model.cache == "shared" and total > self._capacity:
            self._grow(total)
        self._arrays["seqlens_k"][:] = self._lengths + (count - 1)
        self._arrays["total_sequence_length"][...] = total
        if self._prefixes is not None and self._lengths.size == 1:
            self._tokens = np.concatenate([self._tokens[: self._lengths[0]], tokens])
        self._lengths = self._lengths + count

    def _begin_from_prefix(self, row: NDArray[np.int64]) -> int:
        """Put the cache of the longest known beginning in place; returns how many tokens that are.

        The last token is always computed: its logits are wanted.
        """
        self._tokens = row[:0]
        found = None if self._prefixes is None else self._prefixes.longest(row[:-1])
        if found is None:
            return 0
        count, prefix = found
        for value, known in zip(self._values, prefix.values, strict=True):
            whole = np.zeros(value.shape(), known.dtype)
            whole[0, :, :count] = known[:, :count]
            value.update_inplace(whole)
        self._tokens = row[:count]
        return count

    def _keep_prefix(self) -> None:
        if self._prefixes is None or self._lengths.size != 1 or not self._values or not self._whole:
            return
        size = int(self._lengths[0])
        values = tuple(np.ascontiguousarray(value.numpy()[0, :, :size]) for value in self._values)
        self._prefixes.keep(Prefix(self._tokens[:size].copy(), values))

    def _grow(self, total: int) -> None:
        old, recording = self._values, self._recording
        self._recording = None  # given back when its contents are copied
        try:
            self._values, self._capacity = self._cache(self._lengths.size, total)
            kv.copy(old, self._values, int(self._lengths.max()))
        except MemoryError as error:
            raise kv.too_large(self._lengths.size, total) from error
        if self._recordings is not None and recording is not None:
            self._recordings.give_back(recording)
        self._bind_cache()

    def _run(self, step: bool = False) -> NDArray[np.float32]:
        if self._graph.device != "cpu":
            # Binding is what copies a host input to the device, so a changed array must be bound again.
            self._bind_step_inputs(("logit_positions", *LENGTH_INPUTS, *(("input_ids",) if step else ())))
        self._whole = False
        run_bound(self._graph, self._binding)
        self._whole = True
        if self._graph.device != "cpu":
            self._binding.synchronize_outputs()
        if self._model.cache == "concat":
            self._values = self._binding.get_outputs()[1:]
            self._binding.clear_binding_outputs()
            self._binding.bind_ortvalue_output("logits", self._feeds["logits"])
            self._bind_cache()
        return self._suppress(self._arrays["logits"][:, 0])

    def _replay(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        assert self._recording is not None and self._recordings is not None
        self._whole = False
        try:
            with self._recordings.lock:
                logits = self._recording.step(tokens, self._arrays["seqlens_k"])
        except Exception as error:
            raise run_failed(error) from error
        self._whole = True
        return self._suppress(logits)

    def _suppress(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._suppressed:
            logits[:, self._suppressed] = -np.inf
        return logits


class LiveDecoders:
    """The batches in flight of a session; one that nobody holds any more drops out by itself."""

    def __init__(self) -> None:
        self._held: weakref.WeakSet[Decoder] = weakref.WeakSet()

    def add(self, decoder: Decoder) -> None:
        """Count a batch in until it is gone."""
        self._held.add(decoder)

    def memory(self) -> dict[str, int]:
        """Bytes of all batches together: "kv_cache", "kv_used" and "buffers"."""
        parts = [decoder.memory() for decoder in self._held]
        return {name: sum(part[name] for part in parts) for name in ("kv_cache", "kv_used", "buffers")}

    def close(self) -> None:
        """Free the caches."""
        for decoder in list(self._held):
            decoder.close()
