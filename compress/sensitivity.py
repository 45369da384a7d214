"""How much worse a model gets for a small error in an output of a layer: the diagonal of the Fisher matrix.

    fisher = output_fisher(model, windows, names)     # {layer: E[g^2] of its outputs, (N,)}
    loss = expected_loss(weight, approximation, fisher[name], moments[name])

If a layer's outputs are wrong by e, the distribution that the model predicts moves by a Kullback-Leibler
divergence of about 1/2 e^T F e, in nats (Amari, "Natural Gradient Works Efficiently in Learning", 1998,
section 2). F = E[g g^T], where g is the gradient of the log-probability of labels drawn from the model
itself; only its diagonal is kept, and F is taken to be independent of the inputs, as in K-FAC (Martens and
Grosse, arXiv:1503.05671, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gemini.compress.calibrate import Window, as_feed, shortcut
from gemini.compress.experts import StackedLinear
from gemini.model.hooks import hooked


def output_fisher(
    model: nn.Module,
    windows: Sequence[Window],
    names: Collection[str],
    *,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """E[g^2] of each output of the named layers, per row of their inputs: {name: float64 (N,)}.

    g is the gradient of log p(label) with labels drawn from the model's own predictions, one for every row of
    its logits. A model without logits is taken to predict its last states with a unit normal distribution
    around them. A layer that no window reaches, or that the outputs do not depend on, is absent. An output of
    one of several experts has what its rows add to the mean over the rows of all.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    outputs: dict[str, list[tuple[Tensor, list[int]]]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # A leaf of its own, so that weights need no gradient and earlier layers are still reached.
            tracked = output if output.requires_grad else output.detach().requires_grad_()
            rows = output[..., 0].numel()
            outputs[name].append((tracked, args[1] if isinstance(module, StackedLinear) else [rows]))
            return tracked

        return hook

    generator = torch.Generator().manual_seed(seed)
    options = shortcut(model, every_logit=True)
    with hooked(model.get_submodule(name).register_forward_hook(keep(name)) for name in names):
        for window in tqdm(
            windows, desc="sensitivity", unit="window", delay=2, leave=False, disable=not progress
        ):
            with torch.enable_grad():
                score = _log_probability(model(**as_feed(window), **options), generator)
                called = [(name, *each) for name, made in outputs.items() for each in made]
                found = torch.autograd.grad(score, [each for _, each, _ in called], allow_unused=True)
            for (name, _, experts), gradient in zip(called, found, strict=True):
                if gradient is not None:
                    rows = gradient.reshape(-1, gradient.shape[-1])
                    parts = rows.square().split(experts)
                    square = torch.cat([part.sum(0, dtype=torch.float64) for part in parts])
                    totals[name] = totals[name] + square if name in totals else square
                    counts[name] = counts.get(name, 0) + len(rows)
            for made in outputs.values():
                made.clear()
    return {name: total / counts[name] for name, total in totals.items()}


def expected_loss(weight: Tensor, approximation: Tensor, fisher: Tensor, importance: Tensor) -> float:
    """The divergence in nats per row of inputs that an approximation of a weight (N, K) is expected to cost.

    1/2 sum_i F_i sum_j E[x_j^2] (w_ij - w'_ij)^2, inputs taken as uncorrelated; ``fisher`` (N,),
    ``importance`` (K,) = E[x^2].
    """
    return float(expected_losses(weight, approximation, fisher, importance).sum())


def expected_losses(weight: Tensor, approximation: Tensor, fisher: Tensor, importance: Tensor) -> Tensor:
    """What each output adds to `expected_loss`: float64 (N,)."""
    wrong = torch.mv((weight - approximation).square(), importance.to(weight.dtype))
    return 0.5 * wrong.double() * fisher.double()


Prediction = tuple[Tensor, bool]  # log-probabilities (rows, V) and True, or last states (rows, D) and False


@torch.no_grad()
def predict(model: nn.Module, window: Window) -> Prediction:
    """What the model predicts at every position of a window."""
    output = model(**as_feed(window), **shortcut(model, every_logit=True))
    logits = getattr(output, "logits", None)
    if logits is None:
        return output[0].flatten(0, -2).float(), False
    return logits.flatten(0, -2).float().log_softmax(-1), True


def divergence(before: Prediction, after: Prediction) -> float:
    """Kullback-Leibler divergence of what is predicted ``after`` from ``before``, in nats a row.

    States are taken as the middles of unit normal distributions: half of the squared distance.
    """
    (old, probable), (new, _) = before, after
    apart = old.exp().mul_(old - new) if probable else (new - old).square_().div_(2)
    return float(apart.sum(dtype=torch.float64)) / len(old)


def _log_probability(output: Any, generator: torch.Generator) -> Tensor:
    """The log-probability of labels drawn from what the model predicts, summed."""
    logits = getattr(output, "logits", None)
    if logits is None:
        states = output[0]
        noise = torch.randn(states.shape, generator=generator, dtype=states.dtype)
        return (states * noise).sum()  # the part of -1/2 (y - s)^2, y = s + noise, that has a gradient
    rows = logits.flatten(0, -2).log_softmax(-1)
    labels = torch.multinomial(rows.detach().exp(), 1, generator=generator)
    return rows.gather(1, labels).sum()
