"""Which layers a pass may touch, and the reason for each one it may not."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gemini.compress.experts import StackedLinear, pairs

# Below these sizes the scales and the extra node cost more than the smaller weight saves.
MIN_WEIGHTS = 1024
MIN_OUTPUTS = 8
SMALLEST_BLOCK = 16  # of the operator over quantized experts
_PROBE_ROWS = 64


@dataclass(frozen=True)
class Skipped:
    """A layer that keeps its float weights, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """Names of the layers a pass works on; ``head`` and ``embedding`` are not among ``linears``.

    ``tied``: head and embedding hold the same table, so they are quantized once. ``scale_by``: the constant
    that the embedding module multiplies its rows with, None for 1. ``copies``: further embeddings over the
    same table, as encoder and decoder have them, each with its own constant.
    """

    linears: tuple[str, ...]
    convolutions: tuple[str, ...]
    embedding: str | None
    head: str | None
    tied: bool
    scale_by: float | None
    copies: tuple[tuple[str, float | None], ...]
    skipped: tuple[Skipped, ...]


def select_layers(
    model: nn.Module,
    block_size: int,
    skip: tuple[str, ...],
    table_block_size: int | None,
    convolutions: bool = False,
    experts: bool = True,
) -> Selection:
    """Sort the layers of ``model`` into linears, convolutions, token embedding, head and skipped ones.

    ``block_size`` of the linears, ``table_block_size`` of token embedding and head (None: they stay fp32),
    ``skip`` glob patterns over module names, ``convolutions`` and ``experts`` whether the pass has a format
    for those.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = _embedding_of(model), _head_of(model)
    tied = embedding is not None and head is not None and _same_table(embedding, head)
    copies = _copies_of(model, embedding)
    one_table = {embedding, *copies, *({head} if tied else ())}
    shared = _shared_weights(model, one_table)
    routers = _routers(model)
    linears: list[str] = []
    filters: list[str] = []
    ends: dict[nn.Module, str] = {}
    skipped: list[Skipped] = []
    for module, name in names.items():
        is_end = module in one_table or module is head
        if is_end:
            reason = None if table_block_size else "the recipe keeps token embedding and head in fp32"
        elif module in shared:
            reason = f"its weight is shared with {names[shared[module]]}"
        elif module in routers:
            reason = "it routes tokens to experts"
        elif isinstance(module, StackedLinear) and not experts:
            reason = "no operator takes experts in this format"
        else:
            reason = None
        if convolutions and type(module) is nn.Conv2d:
            reason = _conv_reason(name, module, skip)
            if reason:
                skipped.append(Skipped(name, reason))
            else:
                filters.append(name)
            continue
        if not isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            skipped += _float_weights(name, module)
            continue
        size = table_block_size or block_size if is_end else block_size
        is_table = module is embedding or module in copies
        reason = reason or reason_to_skip(name, module, size, skip, is_token_table=is_table)
        if reason:
            skipped.append(Skipped(name, reason))
        elif is_end:
            ends[module] = name
        else:
            linears.append(name)
    for pair in pairs(model):
        chosen = [name for name in pair if name in linears]
        if len(chosen) == 1:
            linears.remove(chosen[0])
            skipped.append(Skipped(chosen[0], "the other product of these experts stays fp32"))
    users = {module for module in one_table if module is not None}
    if not users <= set(ends):  # one of them must stay float, so the table stays and all use it
        for module in users & set(ends):
            skipped.append(Skipped(ends.pop(module), "it shares its weight with a layer that stays fp32"))
        tied = False
    return Selection(
        tuple(linears),
        tuple(filters),
        ends.get(embedding) if embedding is not None else None,
        ends.get(head) if head is not None else None,
        tied,
        _factor(embedding) if embedding is not None and embedding in ends else None,
        tuple((ends[copy], _factor(copy)) for copy in copies if copy in ends),
        tuple(skipped),
    )


def reason_to_skip(
    name: str, module: nn.Module, block_size: int, skip: tuple[str, ...], is_token_table: bool = False
) -> str | None:
    """Why this linear layer or embedding must stay fp32, or None if it may be quantized."""
    for pattern in skip:
        if fnmatchcase(name, pattern):
            return f"the recipe skips {pattern}"
    rows, columns = weight_of(module).shape
    if rows * columns < MIN_WEIGHTS or (rows < MIN_OUTPUTS and not is_token_table):
        return f"{rows} x {columns} weights are too few to save anything"
    if 2 * columns < block_size:
        return f"rows of {columns} would be padded to a block of {block_size}"
    if not bool(torch.isfinite(weight_of(module)).all()):
        return "its weight holds values that are not finite"
    if isinstance(module, nn.Embedding):
        return _embedding_reason(module, is_token_table)
    return _linear_reason(module)


def _conv_reason(name: str, module: nn.Conv2d, skip: tuple[str, ...]) -> str | None:
    for pattern in skip:
        if fnmatchcase(name, pattern):
            return f"the recipe skips {pattern}"
    if module.weight.numel() < MIN_WEIGHTS:
        return f"{module.weight.numel()} weights are too few to save anything"
    if module.padding_mode != "zeros" or torch.nn.utils.parametrize.is_parametrized(module):
        return f"{type(module).__name__} computes more than a convolution"
    return (
        None if bool(torch.isfinite(module.weight).all()) else "its weight holds values that are not finite"
    )


def weight_of(module: nn.Module) -> Tensor:
    """The float weight as (outputs, inputs): Conv1D of transformers stores it transposed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def embedding_scale(module: nn.Embedding) -> float | None:
    """The constant c with ``module(ids) == c * weight[ids]``, or None if the module does something else."""
    ids = torch.linspace(0, module.num_embeddings - 1, min(_PROBE_ROWS, module.num_embeddings)).long()
    with torch.no_grad():
        rows, out = module.weight[ids].double(), module(ids)
    if not isinstance(out, Tensor) or out.shape != rows.shape:
        return None
    energy = rows.square().sum()
    scale = float((rows * out).sum() / energy) if energy > 0 else 1.0
    scale = round(scale) if abs(scale - round(scale)) < 1e-6 else scale
    return float(scale) if torch.allclose(out.double(), scale * rows, rtol=1e-5, atol=1e-7) else None


def _linear_reason(module: nn.Module) -> str | None:
    if isinstance(module, StackedLinear):
        whole = module.in_features % SMALLEST_BLOCK == 0
        return None if whole else f"blocks of experts must fill their {module.in_features} inputs"
    base = Conv1D if isinstance(module, Conv1D) else nn.Linear
    if type(module).forward is not base.forward or torch.nn.utils.parametrize.is_parametrized(module):
        return f"{type(module).__name__} computes more than a linear layer"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "torch's fused attention reads its weight directly"
    return None


def _embedding_reason(module: nn.Embedding, is_token_table: bool) -> str | None:
    if not is_token_table:
        return "it is a small table of positions or types, not the token embedding"
    if module.max_norm is not None:
        return "it rescales rows to max_norm on every look-up"
    return (
        None
        if embedding_scale(module) is not None
        else f"{type(module).__name__} does more than look up rows"
    )


def _float_weights(name: str, module: nn.Module) -> list[Skipped]:
    """Weights of a module that is no linear layer: convolutions, stacked experts, bare matrices."""
    found = []
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.dim() < 2 or parameter.numel() < MIN_WEIGHTS:
            continue
        full = f"{name}.{key}" if name else key
        if isinstance(module, nn.modules.conv._ConvNd):
            found.append(Skipped(name, f"{type(module).__name__} has no quantized operator here"))
        elif parameter.dim() == 3 and parameter.shape[0] > 1:
            found.append(Skipped(full, "it stacks several weights in one 3-D parameter"))
        else:
            found.append(Skipped(full, f"it is a bare parameter of {type(module).__name__}"))
    return found


def _factor(embedding: nn.Embedding) -> float | None:
    """The constant that the module multiplies its rows with, None for 1."""
    scale = embedding_scale(embedding)
    return None if scale == 1.0 else scale


def _copies_of(model: nn.Module, embedding: nn.Embedding | None) -> list[nn.Embedding]:
    """Other embeddings that hold the token embedding's numbers, as those of encoder and decoder often do."""
    if embedding is None:
        return []
    others = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not embedding]
    return [other for other in others if _same_table(embedding, other)]


def _embedding_of(model: nn.Module) -> nn.Embedding | None:
    """The token embedding, as transformers models report it; vision models report a patch projection."""
    module = _ask(model, "get_input_embeddings")
    pair = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if not isinstance(module, nn.Embedding) and pair:
        decoder = _ask(model, "get_decoder")
        module = _ask(decoder, "get_input_embeddings") if isinstance(decoder, nn.Module) else None
    return module if isinstance(module, nn.Embedding) else None


def _head_of(model: nn.Module) -> nn.Module | None:
    module = _ask(model, "get_output_embeddings")
    return module if isinstance(module, nn.Linear | Conv1D) else None


def _ask(model: nn.Module, method: str) -> object:
    ask = getattr(model, method, None)
    try:
        return ask() if callable(ask) else None
    except (AttributeError, NotImplementedError):  # transformers raises these for models without the part
        return None


def _same_table(embedding: nn.Embedding, other: nn.Module) -> bool:
    """Whether both hold the same numbers; flags such as tie_word_embeddings are not trusted."""
    table, weight = embedding.weight.detach(), weight_of(other)
    if table.shape != weight.shape:
        return False
    return table.data_ptr() == weight.data_ptr() or torch.equal(table, weight)


def _shared_weights(model: nn.Module, allowed: set[nn.Module | None]) -> dict[nn.Module, nn.Module]:
    """Layers whose weight tensor another layer also uses, with that other layer."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            owners.setdefault(module.weight.data_ptr(), []).append(module)
    shared: dict[nn.Module, nn.Module] = {}
    for group in owners.values():
        if len(group) > 1 and not set(group) <= allowed:
            shared |= {module: group[0] if module is not group[0] else group[1] for module in group}
    return shared


def _routers(model: nn.Module) -> set[nn.Module]:
    """Linear layers beside ``experts`` with one output per expert: tiny, and their argmax is fragile."""
    found: set[nn.Module] = set()
    for parent in model.modules():
        experts = getattr(parent, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        count = len(experts) if isinstance(experts, nn.ModuleList) else getattr(experts, "count", 0)
        counts = {count} | {p.shape[0] for p in experts.parameters(recurse=False) if p.dim() == 3}
        found |= {m for m in parent.children() if isinstance(m, nn.Linear) and m.out_features in counts}
    return found
