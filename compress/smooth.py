"""SmoothQuant: divide each input feature of a layer by a constant and multiply its weights by the same.

Activations that share one scale are spoilt by a few large features; their size can move into the weights,
which have a scale for each output. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models", arXiv:2211.10438, equation 4.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gemini.compress.calibrate import Window, as_feed, each_input, shortcut
from gemini.compress.select import weight_of

# A feature that calibration never saw away from zero, or a weight column of zeros.
_FLOOR = 1e-5


def smoothing_divisors(
    model: nn.Module,
    windows: Sequence[Window],
    names: Collection[str],
    strength: float,
    progress: bool = True,
) -> dict[str, Tensor]:
    """What the inputs of each named layer are to be divided by: {name: float32 (K,)}.

    Layers that read the same tensor (query, key and value) get one divisor, from the largest weight among
    them, so that it is divided once. A layer that no window reaches is absent.
    """
    peaks, leaders = collect_peaks(model, windows, names, progress)
    groups: dict[str, list[str]] = {}
    for name, leader in leaders.items():
        groups.setdefault(leader, []).append(name)
    result: dict[str, Tensor] = {}
    for leader, members in groups.items():
        largest = torch.stack([weight_of(model.get_submodule(name)).abs().amax(0) for name in members])
        result |= dict.fromkeys(members, smoothing_divisor(peaks[leader], largest.amax(0), strength))
    return result


def smoothing_divisor(peaks: Tensor, largest: Tensor, strength: float) -> Tensor:
    """max|x_j|^a / max|w_j|^(1 - a) for each input feature j: (K,), (K,) -> (K,) float32.

    With ``strength`` a = 1 all of a feature's size goes into the weights, with 0 all weights get one size.
    """
    divisor = peaks.clamp_min(_FLOOR) ** strength / largest.clamp_min(_FLOOR) ** (1 - strength)
    return divisor.float().clamp_min(_FLOOR)


def collect_peaks(
    model: nn.Module, windows: Sequence[Window], names: Collection[str], progress: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The largest |x| of each input feature (K,), and for each layer the first that reads the same tensor.

    Peaks are under the names of those first ones.
    """
    peaks: dict[str, Tensor] = {}
    leaders: dict[str, str] = {}
    given: dict[str, Tensor] = {}

    def take(name: str, x: Tensor) -> None:
        leader = next((other for other, seen in given.items() if seen is x), name)
        given.setdefault(leader, x)
        leaders[name] = leader
        if leader == name:
            peak = x.detach().abs().flatten(0, -2).amax(0)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

    layers = {name: model.get_submodule(name) for name in names}
    with each_input(layers, take), torch.no_grad():
        for window in tqdm(windows, desc="peaks", unit="window", delay=2, leave=False, disable=not progress):
            model(**as_feed(window), **shortcut(model))
            given.clear()
    return peaks, leaders
