"""Static activations: codes of the inputs and outputs of layers, fixed once on calibration data.

Two passes over it: the first finds the extremes, the second counts values between them (see `ranges`), so
nothing but a histogram a tensor is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from torch import Tensor, nn

from gemini.compress.calibrate import Window, each_input, run_over
from gemini.compress.ranges import Codes, codes_of, count_values, entropy_range, percentile_range
from gemini.compress.specs import Activations, Entropy, Percentile
from gemini.model.hooks import hooked

Take = Callable[[str, Tensor], None]


def input_codes(
    model: nn.Module,
    windows: Sequence[Window],
    names: Collection[str],
    method: Activations,
    divisors: Mapping[str, Tensor],
    progress: bool = True,
) -> dict[str, Codes]:
    """The codes of each named layer's input, divided by its divisor where it has one.

    A layer that no window reaches is absent.
    """
    layers = {name: model.get_submodule(name) for name in names}

    @contextmanager
    def watch(take: Take) -> Iterator[None]:
        def divided(name: str, x: Tensor) -> None:
            take(name, x / divisors[name] if name in divisors else x)

        with each_input(layers, divided):
            yield

    return _collect(model, windows, watch, method, progress)


def convolution_codes(
    model: nn.Module,
    windows: Sequence[Window],
    names: Collection[str],
    method: Activations,
    progress: bool = True,
) -> dict[str, tuple[Codes, Codes]]:
    """The codes of each named convolution's input and output; one that no window reaches is absent."""
    layers = {name: model.get_submodule(name) for name in names}

    @contextmanager
    def watch(take: Take) -> Iterator[None]:
        def hook(name: str) -> Callable[..., None]:
            return lambda _module, _args, output: take(f"{name} output", output)

        hooks = (layer.register_forward_hook(hook(name)) for name, layer in layers.items())
        with hooked(hooks), each_input(layers, take):
            yield

    found = _collect(model, windows, watch, method, progress)
    return {name: (found[name], found[f"{name} output"]) for name in names if name in found}


def has_integer_operator(layer: nn.Module) -> bool:
    """Whether QLinearConv can say what this convolution does."""
    return isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str)


def _collect(
    model: nn.Module,
    windows: Sequence[Window],
    watch: Callable[[Take], AbstractContextManager[None]],
    method: Activations,
    progress: bool,
) -> dict[str, Codes]:
    extremes: dict[str, tuple[float, float]] = {}
    counts: dict[str, np.ndarray] = {}

    def widen(key: str, x: Tensor) -> None:
        low, high = (float(value) for value in x.detach().aminmax())
        before = extremes.get(key, (0.0, 0.0))  # every range holds 0
        extremes[key] = (min(low, before[0]), max(high, before[1]))

    def count(key: str, x: Tensor) -> None:
        counts[key] = counts.get(key, 0) + count_values(x, *extremes[key])

    for take in (widen, count):
        with watch(take):
            run_over(model, windows, "ranges", progress)
    return {key: codes_of(*choose_range(counts[key], *extremes[key], method)) for key in counts}


def choose_range(counts: np.ndarray, low: float, high: float, method: Activations) -> tuple[float, float]:
    """The part of [low, high], whose histogram ``counts`` is, that gets codes."""
    if isinstance(method, Percentile):
        return percentile_range(counts, low, high, method.percent)
    if isinstance(method, Entropy):
        return entropy_range(counts, low, high)
    return low, high
