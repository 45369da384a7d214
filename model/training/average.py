"""The running average of a run's weights (Polyak and Juditsky, 1992).

It is what a run is judged by and what it saves: it is worth several annealed epochs, and it costs one pass
over the weights a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from gemini.model.training.state import model_tensors


class RunningAverage:
    """average <- d * average + (1 - d) * weights, with d = min(decay, (1 + step) / (10 + step)).

    The warm-up of d keeps the random weights of the start out of the average. Integers are copied.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.clone() for name, tensor in model_tensors(model).items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Take in the weights after that step."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = model_tensors(model)
        floating = [name for name, tensor in current.items() if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [self.tensors[name] for name in floating], [current[name] for name in floating], 1 - decay
        )
        for name in current.keys() - set(floating):
            self.tensors[name].copy_(current[name])

    @contextlib.contextmanager
    def applied(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards it has its own again."""
        own = {name: tensor.clone() for name, tensor in model_tensors(model).items()}
        _assign(model, self.tensors)
        try:
            yield
        finally:
            _assign(model, own)


@torch.no_grad()
def _assign(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in model_tensors(model).items():
        tensor.copy_(tensors[name])
