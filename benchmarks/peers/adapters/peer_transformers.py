"""transformers on torch: the model's own forward with its key/value cache, in float32, without generate()."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from wire import greedy, nll_of, serve, versions_of


class Transformers:
    def __init__(self, path: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        self._model.eval()
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
            lambda: advance(torch.tensor(prompts)),
            lambda tokens: advance(torch.tensor(tokens)[:, None]),
            new_tokens,
        )

    def nll(self, ids: list[int]) -> float:
        return nll_of(self._model(torch.tensor([ids]), use_cache=False).logits[0, :-1].numpy(), ids[1:])


if __name__ == "__main__":
    serve(Transformers)
