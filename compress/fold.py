"""Batch norms become part of the convolutions in front of them: the same function with fewer operations.

At inference a batch norm is y = gain * (x - mean) / sqrt(variance + epsilon) + shift, a constant factor and a
constant summand a channel, which the weight and the bias of the convolution can take in (Jacob et al. 2018,
arXiv:1712.05877, equation 14). Which norm follows which convolution is seen in a run of the model, and a run
decides whether folding kept its output; no layout is assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gemini.model.hooks import hooked
from gemini.model.vision import sample_pixels

# Of the largest output: float32 sums of a deep tower in another order differ by some 1e-6.
TOLERANCE = 1e-4


def fold_batch_norms(model: nn.Module) -> list[str]:
    """Fold every 2-D batch norm of ``model`` that can be, in place of the modules; returns their names.

    A model that takes no pixels, or has no batch norm, is left alone.
    """
    reader = _pixel_reader(model)
    if reader is None or not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return []
    pixels = sample_pixels(model)

    def run() -> Tensor:
        with torch.no_grad():
            answer = reader(pixel_values=pixels)
        return answer if isinstance(answer, Tensor) else answer[0]

    expected = run()
    names = {module: name for name, module in model.named_modules()}
    folded = []
    for conv, norm in _pairs(model, run):
        put_back = [_swap(model, conv, fuse_conv_bn_eval(conv, norm)), _swap(model, norm, nn.Identity())]
        if torch.allclose(run(), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max())):
            folded.append(names[norm])
            continue
        for undo in put_back:
            undo()
    return folded


def _pixel_reader(model: nn.Module) -> Callable[..., Any] | None:
    """What turns pixels into numbers: the part that reads images beside text, or the model itself."""
    for module in model.modules():
        if callable(getattr(module, "get_image_features", None)):
            return module.get_image_features
    return model if getattr(model, "main_input_name", None) == "pixel_values" else None


def _pairs(model: nn.Module, run: Callable[[], Tensor]) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the norms that read exactly what they return, each called once in a run."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensor is kept, so that no other gets its id
    calls: list[nn.Module] = []
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls.append(module)
        if type(module) is nn.Conv2d:
            made[id(output)] = (module, output)
        elif isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))

    watched = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    with hooked(module.register_forward_hook(note) for module in watched):
        run()
    return [(c, n) for c, n in pairs if calls.count(c) == calls.count(n) == 1 and n.running_var is not None]


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> Callable[[], None]:
    """Put ``new`` wherever ``old`` hangs; returns how to undo it."""
    sites = [
        (parent, key) for parent in model.modules() for key, child in parent.named_children() if child is old
    ]
    for parent, key in sites:
        setattr(parent, key, new.eval().requires_grad_(False))

    def undo() -> None:
        for parent, key in sites:
            setattr(parent, key, old)

    return undo
