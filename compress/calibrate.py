"""Calibration: run text (or feeds) through the model and note how large each input feature of each layer is.

`gemini.compress.stream` does the same block by block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gemini.model.hooks import hooked

Window: TypeAlias = np.ndarray | Tensor | Mapping[str, Any]
# SmolLM2-135M, int4 with GPTQ: perplexity +6.8 %; +7.3 % without, +12.8 % with first tokens left out.
LOUDEST = 3.0
BATCH_TOKENS = 1024


class InputMoments:
    """Running sum of squares and count of one layer's input features, in float64; see :func:`hushed`."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Take in activations (..., K)."""
        rows = hushed(x.detach().reshape(-1, x.shape[-1]))
        square = rows.square().sum(0, dtype=torch.float64)
        self.total = square if self.total is None else self.total + square
        self.count += rows.shape[0]

    def mean(self) -> Tensor | None:
        """E[x^2] per input feature, float64 (K,), or None if the layer was never called."""
        return None if self.total is None else self.total / self.count


def hushed(rows: Tensor) -> Tensor:
    """Rows (N, K) with those scaled down that are more than LOUDEST times as long as the median one.

    The first token of a text often has states hundreds of times as large as others (Sun et al., "Massive
    Activations in Large Language Models", arXiv:2402.17762), and a sum of squares would be about it alone.
    """
    return rows * hush(rows)


def hush(rows: Tensor) -> Tensor:
    """What ``hushed`` multiplies rows (N, K) with, (N, 1), for what else stands beside them."""
    sizes = rows.norm(dim=1, keepdim=True)
    return (LOUDEST * sizes.median() / sizes).clamp(max=1.0).nan_to_num(1.0)


@contextmanager
def watch_inputs(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, InputMoments]]:
    """Inside the block, every call of the named modules adds its input to the moments that are handed out."""
    moments = {name: InputMoments() for name in names}
    layers = {name: model.get_submodule(name) for name in names}
    with each_input(layers, lambda name, x: moments[name].add(x)):
        yield moments


@contextmanager
def each_input(layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the block, every call of a layer hands its name and its first input to ``take``."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: take(name, args[0] if args else next(iter(kwargs.values())))

    with hooked(
        layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()
    ):
        yield


def collect_input_moments(
    model: nn.Module,
    windows: Iterable[Window],
    names: Collection[str],
    progress: bool = True,
    *,
    every_logit: bool = False,
) -> dict[str, Tensor]:
    """E[x^2] of the inputs of the named layers over all windows: {name: float64 (K,)}.

    A window is an int64 array (1, S) of token ids, or a mapping of keyword arguments to arrays. They are
    taken in `batches` and nothing but the sums is kept. A layer that no window reaches is absent from the
    result. The head of a generator sees the last position alone, unless ``every_logit``.
    """
    with watch_inputs(model, names) as moments, idle_head(model, every_logit):
        run_over(model, batches(windows), "calibrate", progress, every_logit=every_logit)
    means = {name: moment.mean() for name, moment in moments.items()}
    return {name: mean for name, mean in means.items() if mean is not None}


@torch.no_grad()
def run_over(
    model: nn.Module, windows: Sequence[Window], title: str, progress: bool, *, every_logit: bool = False
) -> None:
    """Run the windows through the model for those who watch its layers; ``title`` is that of the bar."""
    for window in tqdm(windows, desc=title, unit="batch", delay=2, leave=False, disable=not progress):
        model(**as_feed(window), **shortcut(model, every_logit))


@contextmanager
def idle_head(model: nn.Module, idle: bool = True) -> Iterator[None]:
    """Inside the block, the head of a generator does not compute: of a small model it is a fifth of the time,
    and who calibrates looks at its inputs alone."""
    head = model.get_output_embeddings() if idle and hasattr(model, "get_output_embeddings") else None
    if head is None:
        yield
        return
    head.forward = lambda x, *_args, **_kwargs: x[..., :1]
    try:
        yield
    finally:
        del head.forward


def batches(windows: Iterable[Window]) -> list[Window]:
    """The same windows, those of token ids that follow each other with one length (1, S) as rows of a batch.

    A batch holds up to BATCH_TOKENS: products of more rows are faster, and nobody looks at a window alone.
    """
    made: list[Window] = []
    for window in windows:
        ids = None if isinstance(window, Mapping) else torch.as_tensor(window)
        last = made[-1] if made and isinstance(made[-1], Tensor) else None
        if ids is None:
            made.append(window)
        elif (
            last is not None and last.shape[1] == ids.shape[1] and last.numel() + ids.numel() <= BATCH_TOKENS
        ):
            made[-1] = torch.cat((last, ids))
        else:
            made.append(ids)
    return made


def as_feed(window: Window) -> dict[str, Tensor]:
    """Keyword arguments for the model; a bare array means token ids."""
    if isinstance(window, Mapping):
        return {key: torch.as_tensor(value) for key, value in window.items()}
    return {"input_ids": torch.as_tensor(window)}


def shortcut(model: nn.Module, every_logit: bool = False) -> dict[str, Any]:
    """Arguments that spare the model work which calibration does not look at: most logits, and a cache."""
    # The head is the largest product of a small language model and rarely among the layers watched.
    spared = {"use_cache": False} | ({} if every_logit else {"logits_to_keep": 1})
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in spared.items() if name in known}
