"""onnxruntime-genai: a folder that its model builder wrote, through its Generator."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from wire import greedy, nll_of, serve, versions_of


class OrtGenai:
    def __init__(self, path: str, threads: int, device: str) -> None:
        settings = json.loads((Path(path) / "genai_config.json").read_text())["model"]["decoder"]
        built_for = "".join(name for each in settings["session_options"]["provider_options"] for name in each)
        if (built_for or "cpu") != device:
            raise ValueError(f"this folder was built for {built_for or 'cpu'} and not for {device}")
        config = genai.Config(path)
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = genai.Model(config)
        self.versions = versions_of(
            "onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime", "onnxruntime-gpu"
        )
        decoder = settings["filename"]
        # An upper bound where the table is no part of the head.
        self.bytes_per_token: int | None = sum(
            file.stat().st_size for file in Path(path).glob(f"{decoder}*") if file.is_file()
        )

    def prepare(self, batch: int, length: int) -> None:
        pass

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        ids, length = np.array(prompts, np.int32), len(prompts[0]) + new_tokens + 1
        generator: Any = None

        def prefill() -> list[int]:
            nonlocal generator
            generator = self._generator(len(prompts), length)
            generator.append_tokens(ids if len(prompts) > 1 else ids[0])
            return step([])

        def step(_: list[int]) -> list[int]:
            generator.generate_next_token()
            return generator.get_next_tokens()

        return greedy(prefill, step, new_tokens)

    def nll(self, ids: list[int]) -> float:
        generator = self._generator(1, len(ids) + 1)
        generator.append_tokens(np.array(ids, np.int32))
        logits = generator.get_output("logits")[0]
        if len(logits) != len(ids):
            raise ValueError("this model gives the logits of the last position only")
        return nll_of(logits[:-1], ids[1:])

    def _generator(self, batch: int, length: int) -> Any:
        """min_length as large as max_length: an end-of-text token never stops a row."""
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(batch_size=batch, max_length=length, min_length=length, do_sample=False)
        return genai.Generator(self._model, parameters)


if __name__ == "__main__":
    serve(OrtGenai)
