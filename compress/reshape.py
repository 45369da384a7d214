"""A smaller model of the same class: find the configuration with the shapes, build it, check what it says.

Which field of a configuration means which size is not listed: a field is tried if its value fits, on a model
without storage, and taken if the shapes come out as they should.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from gemini.compress.calibrate import Window, as_feed, shortcut
from gemini.errors import CheckpointError, RecipeError

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = dict[str, Shape]
Change: TypeAlias = dict[tuple[str, ...], Any]  # path of a configuration field -> its new value
Keep: TypeAlias = Mapping[str, Mapping[int, Tensor]]  # tensor of the state dict -> axis -> kept indices

# Of the largest output: sums over fewer terms come in another order, which moves float32 by some 1e-6. A
# layer that is wrong moves it by far more than the few roundings that half precision is granted.
_TOLERANCE = 1e-4
_ROUNDINGS = 16
_MOST_FIELDS = 4  # that change together
_MOST_REFUSED = 2  # of these, fields that the class does not take alone


@dataclass(frozen=True)
class Fit:
    """A configuration, the fields that make it differ from the model's, and the shapes that it makes."""

    config: PreTrainedConfig
    change: Change
    shapes: Shapes


def shapes_of(model: nn.Module) -> Shapes:
    """Shapes of everything in the state dict."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def require_known(model: nn.Module, windows: Sequence[Window] | None = None) -> None:
    """CheckpointError unless the model is exactly what its class builds from its configuration.

    RecipeError for no windows at all, where there should be some.
    """
    if windows is not None and not len(windows):
        raise RecipeError("There is no calibration data.", "Give one window or more.")
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise CheckpointError(
            f"{type(model).__name__} has no configuration of transformers.", "Prune a transformers model."
        )
    if model.training:
        raise CheckpointError("The model is in training mode.", "Call its method eval first.")
    made = _try_shapes(model, {})
    if isinstance(made, Exception):
        raise CheckpointError(
            f"{type(model).__name__} cannot be built from its own configuration: {made}.",
            "Prune the model before adapters are added or layers are quantized.",
        )
    if made != shapes_of(model):
        odd = sorted(made.items() ^ shapes_of(model).items())
        raise CheckpointError(
            f"{odd[0][0]} is not what the model's configuration says.",
            "Prune the model before adapters are added or layers are quantized.",
        )


def fields_of(config: PreTrainedConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every stored field of a configuration and of those inside it: (path, value)."""
    for key in config.to_dict():
        value = getattr(config, key, None)
        if isinstance(value, PreTrainedConfig):
            yield from fields_of(value, (*path, key))
        elif not key.startswith("_"):
            yield (*path, key), value


def changed_config(config: PreTrainedConfig, change: Change) -> PreTrainedConfig:
    """A copy with fields changed, as it would be read back from a file; raises what the class raises."""
    made = copy.deepcopy(config)
    for path, value in change.items():
        owner = made
        for key in path[:-1]:
            owner = getattr(owner, key)
        setattr(owner, path[-1], value)
    # Configurations derive some fields from others when they are read, and check what they read.
    read = type(made).from_dict(made.to_dict())
    read._attn_implementation = config._attn_implementation
    return read


def fit_config(
    model: nn.Module,
    candidates: Sequence[Change],
    accept: Callable[[str, Shape | None, Shape | None], bool],
    wanted: Mapping[str, Shape | None],
    reasons: list[str],
) -> Iterator[Fit]:
    """Configurations that have the shapes wanted, those from the fewest candidates together first.

    ``accept(name, old, new)`` whether a shape may become another, ``wanted`` {name: shape} which ones must be
    there (None: no such tensor). A candidate that changes nothing, or anything that is not accepted, is out.
    Shapes do not tell all: half as many heads look like heads half as wide, so a run has to decide. What the
    class has against a candidate is added to ``reasons``.
    """
    before = shapes_of(model)
    missing = {name for name, shape in wanted.items() if before.get(name) != shape}

    def changed(shapes: Shapes) -> set[str] | None:
        """Names whose shapes differ, None if one of them must not."""
        differing = {n for n in before.keys() | shapes.keys() if before.get(n) != shapes.get(n)}
        return differing if all(accept(n, before.get(n), shapes.get(n)) for n in differing) else None

    # What each candidate changes on its own; None where the class refuses it alone, perhaps not with another.
    pool: list[tuple[Change, set[str] | None]] = []
    for candidate in candidates:
        made = _try_shapes(model, candidate)
        if isinstance(made, Exception):
            fields = ", ".join(f"{'.'.join(path)} = {value}" for path, value in candidate.items())
            reasons.append(f"{fields}: {str(made).strip().splitlines()[-1].strip()}")
            pool.append((candidate, None))
        elif names := changed(made):
            pool.append((candidate, names))
    pool.sort(key=lambda each: each[1] is None)
    for size in range(1, min(_MOST_FIELDS, len(pool)) + 1):
        for chosen in combinations(pool, size):
            known = [names for _, names in chosen if names is not None]
            if size - len(known) > _MOST_REFUSED or (
                len(known) == size and not missing <= set().union(*known)
            ):
                continue
            change: Change = {path: value for each, _ in chosen for path, value in each.items()}
            if len(change) < sum(len(each) for each, _ in chosen):
                continue  # two of them want the same field
            made = _try_shapes(model, change)
            if isinstance(made, Exception) or changed(made) is None:
                continue
            if all(made.get(name) == shape for name, shape in wanted.items()):
                yield Fit(changed_config(model.config, change), change, made)


def _try_shapes(model: nn.Module, change: Change) -> Shapes | Exception:
    """Shapes of a model with a changed configuration, or why there is none."""
    try:
        with torch.device("meta"):
            return shapes_of(type(model)(changed_config(model.config, change)))
    except Exception as error:  # any class may refuse a configuration in its own way
        return error


def cut_state(state: Mapping[str, Tensor], keep: Keep) -> dict[str, Tensor]:
    """The tensors of a state dict with only the indices to keep along each axis named.

    Tensors that share memory and are cut alike share it afterwards.
    """
    made: dict[tuple[Any, ...], Tensor] = {}
    cut: dict[str, Tensor] = {}
    for name, value in state.items():
        axes = keep.get(name, {})
        key = (value.data_ptr(), tuple(value.shape), *((a, tuple(i.tolist())) for a, i in axes.items()))
        if key not in made or value.numel() == 0:
            part = value.detach()
            for axis, index in axes.items():
                part = part.index_select(axis, index)
            made[key] = part.clone() if part is value or part.data_ptr() == value.data_ptr() else part
        cut[name] = made[key]
    return cut


def rebuild(model: nn.Module, config: PreTrainedConfig, state: Mapping[str, Tensor]) -> nn.Module:
    """A model of the same class with another configuration and these tensors, in the same mode."""
    with torch.random.fork_rng(devices=[]):  # initial weights, which are all replaced, cost no randomness
        made = type(model)(config)
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    made.requires_grad_(any(parameter.requires_grad for parameter in model.parameters()))
    return made.train(model.training)


def answer(model: nn.Module, window: Window) -> Tensor:
    """Logits at all positions, or the first output of a model without logits.

    CheckpointError if they are not finite.
    """
    with torch.no_grad():
        output = model(**as_feed(window), **shortcut(model, every_logit=True))
    logits = getattr(output, "logits", None)
    found = output[0] if logits is None else logits
    if not bool(torch.isfinite(found).all()):
        raise CheckpointError(
            "The model's output holds values that are not finite.", "Repair the model first."
        )
    return found


def differ(made: nn.Module, window: Window, expected: Tensor) -> float:
    """Largest difference of a model's answer, as a share of the largest number expected; inf if it fails."""
    try:
        found = answer(made, window)
    except Exception:  # shapes that fit one by one need not fit together
        return float("inf")
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def agrees(made: nn.Module, window: Window, expected: Tensor) -> bool:
    """Whether a model's answer is the one expected, to what its precision allows."""
    return differ(made, window, expected) <= tolerance_of(expected)


def tolerance_of(expected: Tensor) -> float:
    """How far an answer may be off, as a share of the largest number in it."""
    return max(_TOLERANCE, _ROUNDINGS * torch.finfo(expected.dtype).eps)


def require_equal(made: nn.Module, window: Window, expected: Tensor, what: str) -> None:
    """RecipeError unless a model's answer is the one expected."""
    wrong = differ(made, window, expected)
    if not wrong <= tolerance_of(expected):
        raise RecipeError(
            f"The smaller model differs from {what} by {wrong:.2g} of the largest output.",
            "Its layers depend on each other in a way that was not found: prune this model in another way.",
        )
