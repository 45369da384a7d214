"""optimum-onnx: a folder that `optimum-cli export onnx` wrote, through ORTModelForCausalLM's forward."""

from pathlib import Path
from typing import Any

import torch
from onnxruntime import SessionOptions
from optimum.onnxruntime import ORTModelForCausalLM
from wire import greedy, nll_of, only_on_the_cpu, serve, versions_of


class OptimumOnnx:
    def __init__(self, path: str, threads: int, device: str) -> None:
        only_on_the_cpu(device)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        options = SessionOptions()
        options.intra_op_num_threads = threads
        self._model = ORTModelForCausalLM.from_pretrained(
            path, provider="CPUExecutionProvider", session_options=options, local_files_only=True
        )
        self.versions = versions_of("optimum-onnx", "onnxruntime", "transformers", "torch")
        # An upper bound where the table is no part of the head.
        self.bytes_per_token: int | None = sum(file.stat().st_size for file in Path(path).glob("*.onnx*"))

    def prepare(self, batch: int, length: int) -> None:
        pass

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        cache: Any = None
        width = len(prompts[0])

        def advance(rows: torch.Tensor) -> list[int]:
            nonlocal cache, width
            mask = torch.ones(len(prompts), width, dtype=torch.int64)
            width += 1
            output = self._model(rows, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            return output.logits[:, -1].argmax(-1).tolist()

        return greedy(
            lambda: advance(torch.tensor(prompts)),
            lambda tokens: advance(torch.tensor(tokens)[:, None]),
            new_tokens,
        )

    def nll(self, ids: list[int]) -> float:
        rows = torch.tensor([ids])
        output = self._model(rows, attention_mask=torch.ones_like(rows), use_cache=True)
        return nll_of(output.logits[0, :-1].numpy(), ids[1:])


if __name__ == "__main__":
    serve(OptimumOnnx)
