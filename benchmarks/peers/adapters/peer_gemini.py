"""gemini-edge as one of the peers: a bundle through the runtime's decoder, one token at a time."""

from typing import Any

import numpy as np
from wire import greedy, nll_of, serve, versions_of

from gemini.benchmarks.contestants import bytes_per_token
from gemini.runtime.bundle import hashed_meanwhile
from gemini.runtime.checks import check_graph
from gemini.runtime.decoder import Decoder
from gemini.runtime.schema import DecoderModel
from gemini.runtime.scoring import all_logits
from gemini.runtime.session import open_graph


class Gemini:
    def __init__(self, path: str, threads: int) -> None:
        with hashed_meanwhile(path) as bundle:
            model = bundle.manifest.model
            if not isinstance(model, DecoderModel):
                raise ValueError("only text generators are compared")
            self._model, self._graph = model, open_graph(bundle, "decoder", "cpu", threads)
        check_graph(self._graph, model)
        self.versions = versions_of("gemini-edge", "onnxruntime", "numpy")
        self.bytes_per_token: int | None = bytes_per_token(bundle)

    def prepare(self, batch: int, length: int) -> None:
        pass

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        decoder = Decoder(self._graph, self._model, new_tokens)
        try:
            return greedy(
                lambda: decoder.prefill(prompts).argmax(-1),
                lambda tokens: decoder.step(tokens).argmax(-1),
                new_tokens,
            )
        finally:
            decoder.close()

    def nll(self, ids: list[int]) -> float:
        return nll_of(all_logits(self._graph, self._model, np.array([ids]))[0, :-1], ids[1:])


if __name__ == "__main__":
    serve(Gemini)
