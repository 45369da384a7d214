"""llama.cpp through llama-cpp-python's C interface: no sampler, no Python between two tokens but an argmax.

A shape gets a context of its size before the clock starts; the cache is emptied inside the measured time, as
between two requests. Every row of a batch is a sequence with its own part of the cache.
"""

from collections.abc import Sequence
from typing import Any

import llama_cpp as llama
import numpy as np
from wire import greedy, nll_of, only_on_the_cpu, serve, versions_of

BATCH = 512  # tokens of a prompt computed together: llama.cpp's own default for its physical batch
PAD = 256  # the cache of a sequence grows in such steps


class LlamaCpp:
    def __init__(self, path: str, threads: int, device: str) -> None:
        only_on_the_cpu(device)
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise ValueError("llama.cpp cannot load the model")
        self._threads, self._shape = threads, (0, 0, False)
        self._context: Any = None
        self._batch = llama.llama_batch_init(BATCH, 0, 1)
        self._vocab: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self.versions = versions_of("llama-cpp-python")
        self.bytes_per_token: int | None = llama.llama_model_size(self._model)

    def prepare(self, batch: int, length: int, every: bool = False) -> None:
        """every: logits of all positions are kept, not one a row."""
        shape = (batch, -(-length // PAD) * PAD, every)
        if shape == self._shape:
            return
        if self._context:
            llama.llama_free(self._context)
        parameters = llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = shape[0] * shape[1], batch
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_outputs_max = parameters.n_outputs_max_per_seq = 0
        if not every:
            parameters.n_outputs_max, parameters.n_outputs_max_per_seq = max(batch, 1), 1
        parameters.n_threads = parameters.n_threads_batch = self._threads
        self._context = llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise ValueError(f"llama.cpp has no context of {batch} x {length} tokens")
        self._shape = shape

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        rows, width = range(len(prompts)), len(prompts[0])
        position = width

        def prefill() -> list[int]:
            llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
            entries = [
                (token, place, row, place == width - 1)
                for row in rows
                for place, token in enumerate(prompts[row])
            ]
            return [int(logits.argmax()) for logits in self._decode(entries)]

        def step(tokens: list[int]) -> list[int]:
            nonlocal position
            entries = [(token, position, row, True) for row, token in enumerate(tokens)]
            position += 1
            return [int(logits.argmax()) for logits in self._decode(entries)]

        return greedy(prefill, step, new_tokens)

    def nll(self, ids: list[int]) -> float:
        self.prepare(1, len(ids), every=True)
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
        total = 0.0
        for start in range(0, len(ids) - 1, BATCH):
            targets = ids[start + 1 : start + 1 + BATCH]
            entries = [(ids[start + place], start + place, 0, True) for place in range(len(targets))]
            total += nll_of(np.stack(self._decode(entries)), targets)
        return total

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> list[np.ndarray]:
        """Compute (token, position, row, wanted) entries; the logits (V,) of the wanted ones, in order."""
        found = []
        for start in range(0, len(entries), BATCH):
            piece = entries[start : start + BATCH]
            batch = self._batch
            batch.n_tokens = len(piece)
            for index, (token, position, row, wanted) in enumerate(piece):
                batch.token[index], batch.pos[index] = token, position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
                batch.logits[index] = wanted
            if llama.llama_decode(self._context, batch):
                raise RuntimeError("llama_decode failed")
            for index, entry in enumerate(piece):
                if entry[3]:
                    logits = llama.llama_get_logits_ith(self._context, index)
                    row_logits = np.ctypeslib.as_array(logits, (self._vocab,))
                    found.append(row_logits if len(entries) <= BATCH else row_logits.copy())
        return found


if __name__ == "__main__":
    serve(LlamaCpp)
