"""OpenVINO GenAI: its paged pipeline, stepped from here, with the schedule that its LLMPipeline picks.

A GGUF (Q4_0, Q8_0) or a folder in its own format. The prefix cache is off, since it answers a repeated prompt
without reading it. Everything else is its default, a cache of 8-bit keys and values included.
"""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from wire import greedy, only_on_the_cpu, serve, versions_of

WHOLE = 1 << 30  # prompts are never split


class OpenVinoGenai:
    def __init__(self, path: str, threads: int, device: str) -> None:
        only_on_the_cpu(device)
        schedule = genai.SchedulerConfig()
        schedule.enable_prefix_caching, schedule.max_num_batched_tokens = False, WHOLE
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = genai.ContinuousBatchingPipeline(path, schedule, "CPU", properties)
        self._request = 0
        self.versions = versions_of("openvino-genai", "openvino")
        weights = Path(path) if Path(path).is_file() else Path(path) / "openvino_model.bin"
        # An upper bound: a GGUF also holds the tokenizer, and a table may be no part of the head.
        self.bytes_per_token: int | None = weights.stat().st_size

    def prepare(self, batch: int, length: int) -> None:
        pass

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        tensors = [openvino.Tensor(np.array([row], np.int64)) for row in prompts]
        settings = genai.GenerationConfig(do_sample=False, ignore_eos=True, max_new_tokens=new_tokens + 1)
        handles: list[Any] = []

        def prefill() -> list[int]:
            handles.extend(self._add(tensor, settings) for tensor in tensors)
            return step([])

        def step(_: list[int]) -> list[int]:
            self._pipeline.step()
            return [_only(handle.read()).generated_ids[-1] for handle in handles]

        try:
            return greedy(prefill, step, new_tokens)
        finally:
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()

    def nll(self, ids: list[int]) -> float:
        settings = genai.GenerationConfig(
            do_sample=False, ignore_eos=True, max_new_tokens=1, logprobs=1, echo=True
        )
        handle = self._add(openvino.Tensor(np.array([ids], np.int64)), settings)
        chances: list[float] = []  # one a token; the first has none, and gets a 1 that is not read
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            if handle.can_read():
                chances.extend(_only(handle.read()).generated_log_probs)
        return -float(np.sum(np.asarray(chances[1 : len(ids)], np.float64)))

    def _add(self, tensor: Any, settings: Any) -> Any:
        self._request += 1
        return self._pipeline.add_request(self._request, tensor, settings)


def _only(outputs: dict[int, Any]) -> Any:
    (output,) = outputs.values()
    return output


if __name__ == "__main__":
    serve(OpenVinoGenai)
