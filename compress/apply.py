"""Run a recipe on a checkpoint: one function per spec, chosen by one dict.

reports = run_recipe(checkpoint, load_recipe("int4"), calibration=windows)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gemini.compress.awq import Group, fold_awq, fold_divisors, fold_smoothing
from gemini.compress.cache import quantize_cache
from gemini.compress.calibrate import Window, collect_input_moments
from gemini.compress.dense import dense_weights
from gemini.compress.experts import PackedStack, StackedLinear, open_experts, pairs
from gemini.compress.fold import fold_batch_norms
from gemini.compress.layers import (
    Bnb4,
    Channels,
    Integers,
    Split,
    make_conv,
    make_copy,
    make_head,
    make_linear,
    make_table,
    rounded,
)
from gemini.compress.plan import FORMATS, MOMENT_WINDOWS, TABLE_FORMATS, plan_formats, scan_formats
from gemini.compress.quantize import Quantized
from gemini.compress.ranges import Codes
from gemini.compress.recipe import Recipe
from gemini.compress.reports import (
    LayerReport,
    PassReport,
    bits_per_weight,
    layer_report,
    table_reports,
)
from gemini.compress.select import Selection, Skipped, select_layers, weight_of
from gemini.compress.sequential import sequential
from gemini.compress.smooth import smoothing_divisors
from gemini.compress.specs import (
    ByFamily,
    PerBlock,
    PerChannel,
    QuantizeCache,
    QuantizeInt4,
    QuantizeInt8,
    QuantizeMixed,
    QuantizeNF4,
    Spec,
)
from gemini.compress.static import convolution_codes, has_integer_operator, input_codes
from gemini.compress.stream import second_moment, watch_rows
from gemini.errors import RecipeError

if TYPE_CHECKING:
    from gemini.model.checkpoint import Checkpoint

Format = Integers | Channels | Bnb4


def quantize_int8(
    model: nn.Module, spec: QuantizeInt8, windows: Sequence[Window], progress: bool
) -> PassReport:
    """8-bit linears per block or per channel; embedding and head per block, for which there are operators.

    Convolutions per output channel. Static codes for what is per channel, where calibration reached it.
    """
    if spec.static and not windows:
        raise RecipeError(
            "Static activations need calibration, and this model has no text or images to calibrate on.",
            "Use the recipe int8, or give --calibration.",
        )
    per_block = spec.granularity if isinstance(spec.granularity, PerBlock) else None
    table = Integers(8, spec.embedding_block_size)
    selection = select_layers(
        model,
        per_block.size if per_block else 1,
        spec.skip,
        table.block_size if spec.embeddings else None,
        convolutions=True,
    )
    linear = Integers(8, per_block.size) if per_block else Channels()
    formats: dict[str, Format] = dict.fromkeys(selection.linears, linear)
    plain = [name for name in selection.linears if not isinstance(model.get_submodule(name), StackedLinear)]
    stacks = set(selection.linears) - set(plain)
    formats |= dict.fromkeys(stacks, Integers(8, PerBlock().size))  # their operator rounds in blocks alone
    divisors: dict[str, Tensor] = {}
    folds: list[Group] = []
    if spec.smoothing and windows and not per_block:
        divisors = smoothing_divisors(model, windows, plain, spec.smoothing, progress)
        divisors, folds = fold_divisors(model, windows, divisors)
    if spec.block_smoothing and windows and per_block:
        folds = fold_smoothing(model, windows, selection.linears, spec.block_smoothing, progress)
    codes: dict[str, Codes] = {}
    ends: dict[str, tuple[Codes, Codes]] = {}
    if spec.static:
        codes = input_codes(model, windows, plain, spec.activations, divisors, progress)
        filters = [name for name in selection.convolutions if has_integer_operator(model.get_submodule(name))]
        ends = convolution_codes(model, windows, filters, spec.activations, progress)
    report = _edit(
        model, spec, selection, formats, table, progress, divisors=divisors, codes=codes, ends=ends
    )
    return replace(
        report,
        calibration_windows=len(windows) if divisors or folds or spec.static else 0,
        folded=[group.producer for group in folds],
    )


def quantize_int4(
    model: nn.Module, spec: QuantizeInt4, windows: Sequence[Window], progress: bool
) -> PassReport:
    """4-bit linears with fitted scales and zero points; embedding and head at their own width."""
    table_size = max(spec.embedding_block_size, spec.embedding_wide_block_size)
    ends = None if spec.embedding_bits == 32 else table_size
    selection = select_layers(model, spec.block_size, spec.skip, ends, convolutions=True)
    linear = Integers(4, spec.block_size, spec.symmetric, spec.fit)
    folds = fold_awq(model, windows, selection.linears, linear, progress) if spec.awq and windows else {}
    moments: dict[str, Tensor] = {}
    seen = None
    if windows and (spec.sensitive_share or (spec.fit == "moments" and not spec.gptq)):
        # What the head sees, which GPTQ rounds, comes from the same runs, unless layers change before it.
        head = selection.head if spec.embedding_bits == 4 and not spec.gptq else None
        with watch_rows(model, head) if head else nullcontext() as rows:
            every = head is not None
            moments = collect_input_moments(model, windows, selection.linears, progress, every_logit=every)
        seen = rows.mean() if rows is not None and rows.count else None
    formats: dict[str, Format] = dict.fromkeys(selection.linears, linear)
    table: Integers | Split = Integers(spec.embedding_bits, spec.embedding_block_size)
    if spec.embedding_bits == 4:
        table = Integers(4, spec.embedding_block_size, spec.symmetric, spec.fit)
        size = spec.embedding_wide_block_size or spec.embedding_block_size
        wide = Integers(8, size) if spec.embedding_wide_bits == 8 else replace(table, block_size=size)
        if spec.embedding_wide_share:
            table = Split(spec.embedding_wide_share, wide, table)
    share = spec.sensitive_share
    report = _edit(
        model, spec, selection, formats, table, progress, windows, spec.gptq, moments, share, seen=seen
    )
    small_table = selection.head and table.bits == 4
    return replace(
        report,
        calibration_windows=len(windows) if moments or small_table or spec.gptq or spec.awq else 0,
        folded=[group.producer for group in folds],
    )


def quantize_mixed(
    model: nn.Module, spec: QuantizeMixed, windows: Sequence[Window], progress: bool
) -> PassReport:
    """The planned format for each layer."""
    if not windows:
        raise RecipeError(
            "The pass quantize_mixed needs calibration, and this model has no text to calibrate on.",
            "Use the recipe int4 or int8.",
        )
    selection = select_mixed(model, spec)
    chosen = spec.formats
    if not chosen:
        scan = scan_formats(model, selection, windows, gptq=spec.gptq, progress=progress)
        chosen = plan_formats(scan, target_bpw=spec.target_bpw).formats
    formats: dict[str, Format] = {name: FORMATS[chosen[name]] for name in selection.linears if name in chosen}
    for pair in pairs(model):
        own = [FORMATS[chosen[name]] for name in pair if name in chosen]
        if own:  # a recipe may name one, or two that differ
            formats |= dict.fromkeys(pair, max(own, key=lambda form: (form.bits, -form.block_size)))
    kept = [
        Skipped(name, "the recipe names no format for it") for name in selection.linears if name not in chosen
    ]
    end = selection.embedding or selection.head or ""
    table = TABLE_FORMATS[chosen[end]] if end in chosen else None
    if table is None:
        selection = replace(selection, embedding=None, head=None, copies=())
    moments: dict[str, Tensor] = {}
    if not spec.gptq:
        moments = collect_input_moments(model, windows[:MOMENT_WINDOWS], formats, progress)
    table = table or FORMATS["int8-64"]
    report = _edit(model, spec, selection, formats, table, progress, windows, spec.gptq, moments)
    return replace(report, skipped=[*report.skipped, *kept], calibration_windows=len(windows))


def select_mixed(model: nn.Module, spec: QuantizeMixed) -> Selection:
    """The layers that every one of the formats fits."""
    smallest = min(form.block_size for form in FORMATS.values())
    return select_layers(model, smallest, spec.skip, smallest, convolutions=True)


def quantize_nf4(
    model: nn.Module, spec: QuantizeNF4, windows: Sequence[Window], progress: bool
) -> PassReport:
    """bitsandbytes NF4 linears; embedding and head in integer blocks, which have a gather operator."""
    size = PerBlock().size
    ends = None if spec.embedding_bits == 32 else size
    selection = select_layers(model, 1, spec.skip, ends, experts=False)
    formats: dict[str, Format] = dict.fromkeys(selection.linears, Bnb4(spec.block_size))
    return _edit(model, spec, selection, formats, Integers(spec.embedding_bits, size), progress)


Pass = Callable[[nn.Module, Any, Sequence[Window], bool], PassReport]
PASSES: dict[type[Spec], Pass] = {
    QuantizeInt8: quantize_int8,
    QuantizeInt4: quantize_int4,
    QuantizeMixed: quantize_mixed,
    QuantizeNF4: quantize_nf4,
    QuantizeCache: quantize_cache,
}


def run_recipe(
    checkpoint: Checkpoint, recipe: Recipe, calibration: Sequence[Window] | None = None, progress: bool = True
) -> list[PassReport]:
    """Apply the passes in order to ``checkpoint.model``, in place, and report on each.

    Batch norms are folded into their convolutions first, so that what is quantized is what will run, and
    stacks of experts become layers that passes can see (`gemini.compress.experts`).

    ``calibration``: int64 token windows (1, S), or mappings of model inputs to arrays; without it the int4
    fit weighs all input features alike. RecipeError if a pass finds nothing to change.
    """
    reports = []
    folded = fold_batch_norms(checkpoint.model) if recipe.specs else []
    if recipe.specs:
        open_experts(checkpoint.model)
    for spec in recipe.specs:
        start = time.perf_counter()
        spec = settled(spec, checkpoint.family)
        report = PASSES[type(spec)](checkpoint.model, spec, calibration or (), progress)
        if not report.layers:
            first = f": {report.skipped[0].name}, {report.skipped[0].reason}" if report.skipped else ""
            raise RecipeError(
                f"The pass {spec.type} finds no layer to change{first}.", "Use the recipe fp32."
            )
        reports.append(replace(report, seconds=time.perf_counter() - start, folded=[*folded, *report.folded]))
        folded = []
    return reports


def settled(spec: Spec, family: str) -> Spec:
    """The spec with every choice that depends on the family of the model made."""
    if isinstance(spec, QuantizeCache) and family != "decoder":
        raise RecipeError(
            "An 8-bit cache is for text generators without an encoder.", "Leave it out for this model."
        )
    if not isinstance(spec, QuantizeInt8) or not isinstance(spec.granularity, ByFamily):
        return spec
    if spec.static and "decoder" in family:
        raise RecipeError(
            "Static activations are for encoders and image models; a generator's outliers do not bear them.",
            "Use the recipe int8 or int4.",
        )
    return replace(spec, granularity=PerBlock() if "decoder" in family else PerChannel())


def _edit(
    model: nn.Module,
    spec: Spec,
    selection: Selection,
    formats: Mapping[str, Format],
    table: Integers | Split,
    progress: bool,
    windows: Sequence[Window] = (),
    gptq: bool = False,
    moments: Mapping[str, Tensor] = MappingProxyType({}),
    sensitive_share: float = 0.0,
    divisors: Mapping[str, Tensor] = MappingProxyType({}),
    codes: Mapping[str, Codes] = MappingProxyType({}),
    ends: Mapping[str, tuple[Codes, Codes]] = MappingProxyType({}),
    seen: Tensor | None = None,
) -> PassReport:
    """Pack every selected layer and put the packed ones into the model.

    With ``gptq`` those in stacks of blocks are rounded by it on ``windows``, and the others weighed by them;
    a head in 4 bits is rounded by GPTQ wherever there are windows, by ``seen`` (`second_moment`) if given.

    The most sensitive are widened first: which those are is known once all have been packed without GPTQ.
    """
    packed: dict[str, tuple[nn.Module, LayerReport]] = {}

    def pack(names: Collection[str]) -> None:
        for name in tqdm(names, desc=spec.type, unit="layer", delay=2, leave=False, disable=not progress):
            packed[name] = _pack(
                model,
                name,
                formats[name],
                moments.get(name),
                divisor=divisors.get(name),
                input_codes=codes.get(name),
            )

    if sensitive_share:
        pack(formats)
        wide = most_sensitive([report for _, report in packed.values()], sensitive_share)
        alone = {name for pair in pairs(model) for name in pair if not set(pair) <= set(wide)}
        wide = [name for name in wide if name not in alone]
        formats = {**formats, **dict.fromkeys(wide, Integers(8, table.block_size))}
        pack(wide)
    head = selection.head if table.bits == 4 else None
    turns = sequential(model, windows, formats, after=head, progress=progress) if gptq and windows else ()
    for turn in turns:
        if turn.layers == (head,):
            seen = turn.hessian
            continue
        weights = {name: weight_of(model.get_submodule(name)) for name in turn.layers}
        weights |= {name: weights[name] + move for name, move in turn.moves.items()}
        importance, together = turn.hessian.diagonal(), _rounded_together(weights, turn.hessian, formats)
        for name, weight in weights.items():
            packed[name] = _pack(model, name, formats[name], importance, together.get(name), weight=weight)
            _replace(model, model.get_submodule(name), packed[name][0])
    rest = [name for name in formats if name not in packed]
    if gptq and windows and rest:
        moments = {**moments, **collect_input_moments(model, windows, rest, progress)}
    pack(rest)
    reports = [packed[name][1] for name in formats]
    if head and seen is None and windows:
        with dense_weights(model):
            seen = second_moment(model, windows, head)
    layers = [*_edit_ends(model, selection, table, seen), *reports]
    layers += _edit_convolutions(model, selection, ends)
    for name, (new, _) in packed.items():
        _replace(model, model.get_submodule(name), new)
    return PassReport(
        spec.type, spec.to_dict(), layers, list(selection.skipped), bits_per_weight(layers), 0, 0.0
    )


def _pack(
    model: nn.Module,
    name: str,
    form: Format,
    importance: Tensor | None = None,
    made: Quantized | None = None,
    divisor: Tensor | None = None,
    input_codes: Codes | None = None,
    weight: Tensor | None = None,
) -> tuple[nn.Module, LayerReport]:
    """The packed layer, of ``weight`` in place of its own where one is given."""
    old = model.get_submodule(name)
    weight = weight_of(old) if weight is None else weight
    new = make_linear(weight, old.bias, form, importance, made, divisor, input_codes)
    if isinstance(old, StackedLinear):
        return PackedStack(new, old.experts), layer_report(name, "experts", weight, new, importance)
    return new, layer_report(name, "linear", weight, new, importance)


def _rounded_together(
    weights: Mapping[str, Tensor], hessian: Tensor, formats: Mapping[str, Format]
) -> dict[str, Quantized]:
    """What GPTQ makes of the weights, by layer, that are to have integer blocks and read one tensor.

    Those in one format are one weight to it, as query, key and value: rows are independent, and one tall
    weight takes as many steps as one of them.
    """
    groups: dict[Integers, list[str]] = {}
    for name in weights:
        form = formats[name]
        if isinstance(form, Integers):
            groups.setdefault(form, []).append(name)
    made: dict[str, Quantized] = {}
    for form, names in groups.items():
        whole = rounded(torch.cat([weights[name] for name in names]), hessian, form)
        made.update(zip(names, whole.split([len(weights[name]) for name in names]), strict=True))
    return made


def most_sensitive(layers: Sequence[LayerReport], share: float) -> list[str]:
    """Names of the layers with the largest relative error that together hold at most ``share`` of the
    weights.

    On SmolLM2-135M a share of 3 % picks 28 of the 30 value projections and nothing else, which is what a
    choice by hand would be.
    """
    budget = share * sum(layer.parameters for layer in layers)
    chosen = []
    for layer in sorted(layers, key=lambda layer: (-layer.relative_error, layer.name)):
        if layer.parameters <= budget:
            chosen.append(layer.name)
            budget -= layer.parameters
    return chosen


def _edit_ends(
    model: nn.Module,
    selection: Selection,
    table: Integers | Split,
    hessian: Tensor | None = None,
) -> Iterator[LayerReport]:
    """Quantize token embedding and head; when tied, the head is built on the embedding's own buffers.

    ``hessian``: of the head's inputs, for GPTQ.
    """
    shared = None
    if selection.embedding:
        old = model.get_submodule(selection.embedding)
        shared = make_table(weight_of(old), table, selection.scale_by, hessian if selection.tied else None)
        yield from table_reports(selection.embedding, "embedding", weight_of(old), shared)
    if selection.head:
        head = model.get_submodule(selection.head)
        twin = shared if selection.tied else None
        new = make_head(weight_of(head), head.bias, table, hessian, twin)
        kind = "tied head" if selection.tied else "head"
        for report in table_reports(selection.head, kind, weight_of(head), new):
            yield replace(report, parameters=0, bytes=0) if selection.tied else report
        _replace(model, head, new)
    if selection.embedding and shared is not None:
        _replace(model, old, shared)
        for name, scale_by in selection.copies:
            _replace(model, model.get_submodule(name), make_copy(shared, scale_by))


def _edit_convolutions(
    model: nn.Module, selection: Selection, ends: Mapping[str, tuple[Codes, Codes]]
) -> Iterator[LayerReport]:
    """Pack the selected convolutions, those with codes for their ends to compute in integers."""
    for name in selection.convolutions:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Conv2d)
        new = make_conv(old, ends.get(name))
        yield layer_report(name, "convolution", old.weight.detach().flatten(1), new, None)
        _replace(model, old, new)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` hangs; a module may be a child of several parents."""
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if child is old:
                setattr(parent, key, new)
