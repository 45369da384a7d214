"""Low-rank adapters: a model learns through few weights, which then become part of the others.

    with adapted(model, rank=16, nf4=True):
        distill(model, ...)             # only adapters learn

LoRA (Hu et al., arXiv:2106.09685) through peft. With ``nf4`` the weights lie in 4-bit NF4 of bitsandbytes
meanwhile (QLoRA, Dettmers et al., arXiv:2305.14314); what was learned is added to the weights as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gemini.errors import UsageError

RANK = 16


@contextmanager
def adapted(model: nn.Module, rank: int = RANK, nf4: bool = False) -> Iterator[None]:
    """Give every linear layer but the head an adapter, the only thing that learns while the block runs.

    A block that fails leaves the weights as they were.
    UsageError if peft, or bitsandbytes for ``nf4``, is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UsageError(
            "Adapters need peft.", "Install it with: pip install 'gemini-edge[train]'."
        ) from None
    head = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if nf4:
        for name, module in linears.items():
            model.set_submodule(name, _in_nf4(module))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(linears), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that will go
        torch.manual_seed(0)
        wrapper = get_peft_model(model, config)
    try:
        yield
        for name, module in linears.items():
            module.weight.data += model.get_submodule(name).get_delta_weight("default")
    finally:
        wrapper.unload()
        for name, module in linears.items():
            model.set_submodule(name, module)
        model.requires_grad_(False)


def _in_nf4(layer: nn.Linear) -> nn.Module:
    """The same layer with its weight in NF4."""
    try:
        from bitsandbytes.nn.modules import Linear4bit, Params4bit
    except ImportError:
        raise UsageError(
            "Weights in NF4 need bitsandbytes.", "Install it with: pip install 'gemini-edge[compress]'."
        ) from None
    made = Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    made.weight = Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    made.bias = layer.bias
    made.to(layer.weight.device)  # which quantizes
    return made.train()  # in evaluation bitsandbytes repacks the weight where the processor has bf16
