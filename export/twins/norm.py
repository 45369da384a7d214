"""Root-mean-square norms, recognised by what they compute rather than by their class.

A module is a norm if ``y = gain * x / sqrt(mean(x^2) + epsilon)`` reproduces it; gains stored as ``1 +
weight`` need no special case because the gain is measured. Layer norms of torch trace to LayerNormalization
by themselves.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4; ONNX operator
RMSNormalization.
"""

from __future__ import annotations

import torch
from torch import nn

from gemini.export.twins.operators import emit

# A norm in float32 reproduces itself to about 1e-6 relative; anything above this is another function.
TOLERANCE = 1e-5
# The standard opset that brought RMSNormalization.
OPSET = 23
LARGEST_EPSILON = 1e-2


class NormTwin(nn.Module):
    """Emits RMSNormalization over the last axis."""

    def __init__(self, gain: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.register_buffer("gain", gain)
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attributes = {"axis": -1, "epsilon": self.epsilon, "stash_type": 1}
        return emit("RMSNormalization", (x, self.gain), attributes, x.shape, version=OPSET)


def as_norm(module: nn.Module) -> NormTwin | None:
    """The twin of a childless module with 1-D parameters that behaves as an RMS norm; None for anything
    else."""
    parameters = list(module.parameters(recurse=False))
    if isinstance(module, nn.LayerNorm) or any(True for _ in module.children()):
        return None
    if len(parameters) != 1 or parameters[0].dim() != 1:
        return None
    weight = parameters[0].detach().float()
    probe = _probe(weight.numel())
    try:
        with torch.no_grad():
            expected = module(probe)
    except Exception:  # any failure on a plain 2-D input means that it is not a norm
        return None
    if not isinstance(expected, torch.Tensor) or expected.shape != probe.shape:
        return None
    for epsilon in _epsilons(module):
        unit = probe * torch.rsqrt(probe.square().mean(-1, keepdim=True) + epsilon)
        for gain in (weight, 1 + weight):
            if torch.allclose(unit * gain, expected, rtol=TOLERANCE, atol=TOLERANCE):
                return NormTwin(gain.clone(), epsilon)
    return None


def _probe(size: int) -> torch.Tensor:
    """Rows of very different magnitudes and means: a centred norm, a wrong epsilon or a clamp shows on one
    of them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, size, generator=generator) * torch.tensor([[1e-3], [1e-1], [1.0], [30.0]])
    return torch.cat([rows, rows[2:] + 0.7])


def _epsilons(module: nn.Module) -> list[float]:
    return sorted({v for v in vars(module).values() if isinstance(v, float) and 0 < v < LARGEST_EPSILON})
