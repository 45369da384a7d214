"""gemini-edge as one of the peers: a bundle through the runtime's decoder, one token at a time."""

from typing import Any

import numpy as np
from wire import greedy, nll_of, serve, versions_of

from gemini.runtime import load


class Gemini:
    def __init__(self, path: str, threads: int, device: str) -> None:
        # Token ids go in and come out, here and in the other adapters.
        session: Any = load(path, device, threads, skip_tokenizer=True)
        self._session = session
        self.versions = versions_of("gemini-edge", "onnxruntime", "numpy")
        self.bytes_per_token: int | None = session.bundle.weight_bytes

    def prepare(self, batch: int, length: int) -> None:
        pass

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        decoder = self._session.decoder(new_tokens)
        try:
            return greedy(
                lambda: decoder.prefill(prompts).argmax(-1),
                lambda tokens: decoder.step(tokens).argmax(-1),
                new_tokens,
            )
        finally:
            decoder.close()

    def nll(self, ids: list[int]) -> float:
        return nll_of(self._session.logits(np.array([ids]))[0, :-1], ids[1:])


if __name__ == "__main__":
    serve(Gemini)
