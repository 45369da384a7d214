"""Put twins in place of modules while a block runs, and put the modules back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from gemini.export.forms import Form
from gemini.export.trace_state import FormMismatch
from gemini.export.twins.attention import NAME as ATTENTION
from gemini.export.twins.conv import as_conv
from gemini.export.twins.embedding import as_embedding
from gemini.export.twins.experts import as_experts_twin
from gemini.export.twins.head import PickPositions
from gemini.export.twins.linear import as_linear
from gemini.export.twins.norm import as_norm
from gemini.export.twins.rotary import LONGEST_TABLE, RotaryTwin, is_rotary_module, rotary_functions_deferred
from gemini.model.hooks import hooked


@contextmanager
def twinned(
    model: nn.Module,
    form: Form,
    context_length: int | None,
    sample: dict[str, torch.Tensor],
    head: nn.Module | None,
) -> Iterator[Counter[str]]:
    """Replace everything that has a better operator in this form; yields how many of each twin there are.

    ``sample`` are inputs for a dry run that shows how rotary modules are called; ``head`` is the output head
    that should compute only the positions asked for. Nothing of the model is copied: twins share its tensors.
    """
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    counts: Counter[str] = Counter()
    attention_before = model.config._attn_implementation
    with ExitStack() as stack:
        try:
            _set_attention(model, "eager" if form.attention == "model" else ATTENTION)
            if form.rotary == "fused":
                _swap_rotary(model, context_length, sample, swapped)
                stack.enter_context(rotary_functions_deferred(model))
            _swap_modules(model, form, swapped, head)
            counts.update(type(getattr(parent, name)).__name__ for parent, name, _ in swapped)
            yield counts
        finally:
            for parent, name, original in reversed(swapped):
                setattr(parent, name, original)
            _set_attention(model, attention_before)


def _set_attention(model: nn.Module, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except Exception as error:  # transformers raises several kinds for models that predate its interface
        raise FormMismatch(f"the model's attention cannot be replaced: {error}") from error
    if model.config._attn_implementation == name:
        return
    if name == ATTENTION:
        raise FormMismatch("the model's attention cannot be replaced")
    model.config._attn_implementation = name  # its own code asks the configuration, not the interface


def _swap_modules(
    root: nn.Module, form: Form, swapped: list[tuple[nn.Module, str, nn.Module]], head: nn.Module | None
) -> None:
    for name, child in list(root.named_children()):
        twin = as_linear(child) or as_embedding(child) or as_conv(child) or as_experts_twin(child)
        twin = twin or (as_norm(child) if form.norms else None)
        if child is head:
            if twin is None:  # its parts may have twins
                _swap_modules(child, form, swapped, None)
            twin = PickPositions(twin or child)
        if twin is None:
            if not isinstance(child, RotaryTwin):
                _swap_modules(child, form, swapped, head)
            continue
        swapped.append((root, name, child))
        setattr(root, name, twin.eval())


def _swap_rotary(
    model: nn.Module,
    context_length: int | None,
    sample: dict[str, torch.Tensor],
    swapped: list[tuple[nn.Module, str, nn.Module]],
) -> None:
    """Record how the model calls its rotary modules in one eager run, then prepare their tables."""
    positions = min(context_length or LONGEST_TABLE, LONGEST_TABLE)
    sites = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if is_rotary_module(child)
    ]
    twins = {id(child): RotaryTwin(child, positions) for _, _, child in sites}
    calls: list[tuple[RotaryTwin, tuple, dict]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        extra = {k: v for k, v in kwargs.items() if k not in ("x", "position_ids")}
        calls.append((twins[id(module)], args[2:], extra))

    hooks = (child.register_forward_pre_hook(note, with_kwargs=True) for _, _, child in sites)
    replacement = model.config._attn_implementation
    try:
        _set_attention(model, "eager")
        with hooked(hooks), torch.no_grad():
            model(**sample)
    finally:
        _set_attention(model, replacement)
    for twin, args, kwargs in calls:
        twin.prepare(args, kwargs)
    for parent, name, child in sites:
        swapped.append((parent, name, child))
        setattr(parent, name, twins[id(child)])
