"""LoRA through peft: W + (alpha / rank) B A, only A and B learn (Hu et al., ICLR 2022, section 4.1)."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def add_lora(model: nn.Module, rank: int, alpha: int, *, train_also: tuple[str, ...] = ()) -> Any:
    """Freeze ``model``, put adapters into its attention projections in place; returns peft's wrapper of it.

    ``train_also`` names modules that keep learning as a whole, such as a fresh classification head.
    """
    from peft import LoraConfig, get_peft_model

    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in TARGETS if name in present]
    adapters = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
    with warnings.catch_warnings():  # peft asks transformers by a name that will go
        warnings.simplefilter("ignore", FutureWarning)
        wrapper = get_peft_model(model, adapters)
    for name in train_also:
        model.get_submodule(name).requires_grad_(True)
    return wrapper


def merge_lora(wrapper: Any) -> nn.Module:
    """Add the adapters to the weights; the model is then an ordinary one again."""
    merged: nn.Module = wrapper.merge_and_unload()
    return merged
