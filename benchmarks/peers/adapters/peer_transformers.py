"""transformers on torch: the model's own forward with its key/value cache, without generate().

In float32 on the CPU, in float16 on a GPU.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from wire import greedy, nll_of, serve, versions_of


class Transformers:
    def __init__(self, path: str, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        dtype = torch.float32 if device == "cpu" else torch.float16
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        self._model, self._device = model.to(device).eval(), device
        self.versions = versions_of("transformers", "torch")
        # A table tied to the head is one tensor, which the head reads whole; otherwise an upper bound.
        self.bytes_per_token: int | None = sum(
            tensor.numel() * tensor.element_size() for tensor in self._model.parameters()
        )

    def prepare(self, batch: int, length: int) -> None:
        pass

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        cache: Any = None

        def advance(rows: torch.Tensor) -> list[int]:
            nonlocal cache
            output = self._model(rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            return output.logits[:, -1].argmax(-1).tolist()

        return greedy(
            lambda: advance(torch.tensor(prompts, device=self._device)),
            lambda tokens: advance(torch.tensor(tokens, device=self._device)[:, None]),
            new_tokens,
        )

    def nll(self, ids: list[int]) -> float:
        rows = torch.tensor([ids], device=self._device)
        logits = self._model(rows, use_cache=False).logits[0, :-1].float().cpu()
        return nll_of(logits.numpy(), ids[1:])


if __name__ == "__main__":
    serve(Transformers)
