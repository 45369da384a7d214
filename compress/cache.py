"""Keys and values of past tokens in 8 bits: one scale a channel, fixed in calibration.

    report = quantize_cache(model, spec, windows, progress)      # leaves CacheScales in the model

Some channels of keys are large for every token (Hooper et al., "KVQuant", arXiv:2401.18079, section 3.2),
so each has a scale of its own, of values too. Codes are symmetric, as GroupQueryAttention of onnxruntime
wants them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gemini.compress.calibrate import Window, as_feed, shortcut
from gemini.compress.dense import dense_weights
from gemini.compress.reports import LayerReport, PassReport
from gemini.compress.specs import QuantizeCache
from gemini.errors import RecipeError

NAME = "cache_scales"  # of the child module
LARGEST = 127
# The first tokens have keys unlike all others, and stand nowhere but at the beginning (Sun et al.,
# arXiv:2402.17762).
_FIRST = 4

Pairs = list[tuple[Tensor, Tensor]]


class CacheScales(nn.Module):
    """Float32 scales (kv_heads, dim) of keys and of values, a pair a layer: code = round(x / scale)."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        for index, (keys, values) in enumerate(pairs):
            self.register_buffer(f"key_{index}", keys)
            self.register_buffer(f"value_{index}", values)

    def pairs(self) -> Pairs:
        """(keys, values) of each layer."""
        count = len(list(self.buffers())) // 2
        return [
            (self.get_buffer(f"key_{index}"), self.get_buffer(f"value_{index}")) for index in range(count)
        ]


def scales_of(model: nn.Module) -> CacheScales | None:
    """What ``quantize_cache`` left in the model."""
    return getattr(model, NAME, None)


def rounded(x: Tensor, scales: Tensor) -> Tensor:
    """Keys or values (..., kv_heads, S, dim) as their codes stand for them; ``scales`` (kv_heads, dim)."""
    steps = scales[:, None, :]
    return (x / steps).round().clamp(-LARGEST - 1, LARGEST) * steps


def quantize_cache(
    model: nn.Module, spec: QuantizeCache, windows: Sequence[Window], progress: bool
) -> PassReport:
    """Find the scales on the model as it is now, weights quantized or not, and leave them in it."""
    if not windows:
        raise RecipeError(
            "An 8-bit cache needs calibration, and this model has no text to calibrate on.",
            "Leave it out, or give --calibration.",
        )
    extremes: list[list[Tensor]] = []
    last: Pairs = []
    with dense_weights(model):
        for known, whole in _caches(model, windows, progress):
            last = whole
            found = [[x.abs().amax(1) for x in pair] for pair in known]
            extremes = [
                [torch.maximum(a, b) for a, b in zip(before, new, strict=True)]
                for before, new in zip(extremes or found, found, strict=True)
            ]
    smallest = torch.finfo(torch.float32).tiny * LARGEST
    scales = CacheScales(
        [(k.clamp_min(smallest) / LARGEST, v.clamp_min(smallest) / LARGEST) for k, v in extremes]
    )
    setattr(model, NAME, scales)
    layers = [
        _layer_report(f"cache.{index}.{kind}", x, steps)
        for index, (pair, own) in enumerate(zip(last, scales.pairs(), strict=True))
        for kind, x, steps in zip(("key", "value"), pair, own, strict=True)
    ]
    return PassReport(spec.type, spec.to_dict(), layers, [], None, len(windows), 0.0)


def _caches(model: nn.Module, windows: Sequence[Window], progress: bool) -> Iterator[tuple[Pairs, Pairs]]:
    """Keys and values (kv_heads, S, dim) of each layer for each window (1, S): those that count, and all.

    Windows begin at places spread over the whole context: rotary positions turn keys, and those far from the
    beginning reach into other channels.
    """
    taken = inspect.signature(model.forward).parameters
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, window in enumerate(
        tqdm(windows, desc="cache ranges", unit="window", delay=2, leave=False, disable=not progress)
    ):
        feed = as_feed(window)
        length = feed["input_ids"].shape[1]
        start = 0
        if context and "position_ids" in taken and len(windows) > 1:
            start = index * max(context - length, 0) // (len(windows) - 1)
            feed["position_ids"] = torch.arange(start, start + length)[None]
        with torch.no_grad():
            output = model(**feed, **(shortcut(model) | {"use_cache": True}))
        whole = [(layer.keys[0], layer.values[0]) for layer in output.past_key_values.layers]
        # A sliding window has let the first tokens go by itself.
        first = [min(_FIRST, length - 1) if start and x.shape[1] == length else 0 for x, _ in whole]
        yield [(k[:, n:], v[:, n:]) for n, (k, v) in zip(first, whole, strict=True)], whole


def _layer_report(name: str, x: Tensor, scales: Tensor) -> LayerReport:
    """``parameters`` and ``bytes`` are those of one token; the error is that of the numbers themselves."""
    error = (x - rounded(x, scales)).square().sum(dtype=torch.float64)
    energy = x.square().sum(dtype=torch.float64)
    count = scales.numel()
    return LayerReport(
        name, "cache", 8, None, True, count, count, float(error / energy) if energy > 0 else 0.0
    )
