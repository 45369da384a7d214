"""What a mask means, instead of the mask.

transformers describes every attention mask by a function of (batch, head, query, key) before it fills a
tensor. The exporter registers its own filler, which asks that function about a few positions, and hands the
model a
MaskMeaning: causal or not, the window if there is one, and the padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True)
class MaskMeaning:
    """causal: keys after the query are hidden; window: only the last ``window`` keys are seen (None: all), or
    where the mask is not causal those at most ``window`` places away.

    padding: (batch, keys), true where a token is; None when nothing is padded. ``known`` is False for any
    other mask: a model may make one that none of its layers uses.
    """

    causal: bool
    window: int | None
    padding: torch.Tensor | None
    known: bool = True


class _Index(int):
    """A position that is tensor-like enough for transformers' mask functions: what they compute stays one."""

    device = None

    def to(self, *_args: Any, **_kwargs: Any) -> _Index:
        return self

    def new_ones(self, *_args: Any, **_kwargs: Any) -> _Index:
        return _Index(1)


def _closed(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def operation(self: _Index, *others: Any) -> Any:
        result = plain(self, *others)
        return result if result is NotImplemented else _Index(result)

    return operation


for _name in ("and", "rand", "or", "add", "radd", "sub", "rsub", "floordiv", "mod", "abs", "neg"):
    setattr(_Index, f"__{_name}__", _closed(f"__{_name}__"))
for _name in ("lt", "le", "gt", "ge"):
    setattr(_Index, f"__{_name}__", _closed(f"__{_name}__"))


def _in_window(window: int, query: int, key: int) -> bool:
    return query - window < key <= query


def _is_near(window: int, query: int, key: int) -> bool:
    return abs(query - key) <= window


def read_mask(
    *,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None = None,
    config: Any = None,
    **_: Any,
) -> MaskMeaning:
    """The mask filler that transformers' registry calls."""
    windows = {
        getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")
    }
    for window in sorted(w for w in windows if isinstance(w, int) and w > 0):
        if _agrees(mask_function, partial(_in_window, window), reach=window):
            return MaskMeaning(True, window, attention_mask)
        if _agrees(mask_function, partial(_is_near, window), reach=window):
            return MaskMeaning(False, window, attention_mask)
    if _agrees(mask_function, lambda q, k: k <= q):
        return MaskMeaning(True, None, attention_mask)
    if _agrees(mask_function, lambda q, k: True):
        return MaskMeaning(False, None, attention_mask)
    return MaskMeaning(False, None, attention_mask, known=False)


def _agrees(function: Callable[..., Any], rule: Callable[[int, int], bool], reach: int = 8) -> bool:
    far = 2 * reach + 16
    queries = (0, 1, 5, reach, far)
    keys = sorted(
        {0, 1, 2, 5, 7, reach - 1, reach, reach + 1, far - reach, far - reach + 1, far - 1, far, far + 1}
    )
    zero = _Index(0)
    try:
        answers = [
            bool(function(zero, zero, _Index(q), _Index(k))) == rule(q, k)
            for q in queries
            for k in keys
            if k >= 0
        ]
    except Exception:  # a mask that looks at tokens or tensors cannot be asked about plain positions
        return False
    return all(answers)
