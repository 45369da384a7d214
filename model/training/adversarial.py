"""FGM: training on the worst small change of the embeddings (Miyato, Dai and Goodfellow, ICLR 2017).

    r = radius * g / ||g||_2,   g = the gradient of the loss at the embeddings s of one example   (eq. 4)
    loss + loss at s + r

A text cannot be changed continuously, its embeddings can. A forward hook makes the change, so that any model
with a token embedding can be trained this way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def adversarial_loss(
    embedding: nn.Module, loss: Callable[[], Tensor], radius: float
) -> tuple[Tensor, Tensor]:
    """(loss, loss under attack); ``loss`` runs the model once, which may embed more than one text."""
    seen: list[Tensor] = []

    def remember(output: Tensor) -> Tensor:
        # With frozen weights (LoRA) nothing below the embedding asks for a gradient: ask here.
        seen.append(output if output.requires_grad else output.requires_grad_())
        return seen[-1]

    with _changing(embedding, remember):
        clean = loss()
    gradients = torch.autograd.grad(clean, seen, retain_graph=True)
    changes = iter([radius * _unit(gradient) for gradient in gradients])
    with _changing(embedding, lambda output: output + next(changes)):
        return clean, loss()


def _unit(gradient: Tensor) -> Tensor:
    """(B, T, D) scaled to length 1 in each example; an example without a gradient stays as it is."""
    length = torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.ndim)), keepdim=True)
    return gradient / length.clamp_min(torch.finfo(gradient.dtype).tiny)


def _changing(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    return module.register_forward_hook(lambda _module, _inputs, output: change(output))
