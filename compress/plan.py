"""Mixed precision: which layer gets which format, when bytes are few or little may be lost.

    scan = scan_formats(model, selection, windows)
    plan = plan_formats(scan, target_bpw=5.0)
    plan.formats["model.layers.0.mlp.up_proj"]      # "int4-32", a key of FORMATS

A format's price is its stored bytes, its loss the divergence that `gemini.compress.sensitivity` expects of
the weight it would leave. That tells layers of one kind apart but takes errors to be independent of inputs,
so each kind (all value projections, say) is quantized once for real and its losses are scaled to the
divergence measured. `gemini.compress.allocate` spends the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gemini.compress.allocate import Choice, allocate
from gemini.compress.calibrate import Window, collect_input_moments
from gemini.compress.experts import pairs
from gemini.compress.layers import Integers, Split, quantized
from gemini.compress.select import Selection, weight_of
from gemini.compress.sensitivity import divergence, expected_losses, output_fisher, predict
from gemini.compress.specs import MIXED_FORMATS, SPLIT_FORMATS
from gemini.compress.stream import find_stacks
from gemini.errors import RecipeError

FORMATS = {
    "int4-64": Integers(4, 64, symmetric=False, fit="moments"),
    "int4-32": Integers(4, 32, symmetric=False, fit="moments"),
    "int8-64": Integers(8, 64),
}
SPLITS = {
    name: Split(1 / int(name.removeprefix("split-")), FORMATS["int8-64"], FORMATS["int4-32"])
    for name in SPLIT_FORMATS
}
TABLE_FORMATS: dict[str, Integers | Split] = {**FORMATS, **SPLITS}
# What GPTQ leaves of the divergence, moves included. Planned for 95 MB, SmolLM2-135M loses 0.039 nats on
# prose and 0.030 on documentation, where its formats as they are promise 0.063.
GPTQ_LEAVES = 0.55
MOMENT_WINDOWS, TRIED_WINDOWS = 16, 4
User = tuple[Tensor | None, Tensor | None]  # of a weight: F of its outputs, E[x^2] of its inputs


@dataclass(frozen=True)
class Scan:
    """Bytes and expected loss of every format for every layer, the table under its embedding's name.

    The two products of experts have one choice, under the name of the first.
    """

    choices: Mapping[str, Sequence[Choice[str]]]
    parameters: int
    with_others: Mapping[str, str] = field(default_factory=dict)  # layers that have the format of another


@dataclass(frozen=True)
class Plan:
    """The formats chosen, what they take, and the loss that is expected of them."""

    formats: dict[str, str]
    bytes: int
    expected_loss: float  # nats a token
    bits_per_weight: float


def scan_formats(
    model: nn.Module,
    selection: Selection,
    windows: Sequence[Window],
    *,
    gptq: bool = False,
    progress: bool = True,
) -> Scan:
    """Try every format on every selected layer. A layer that calibration never reached loses nothing.

    With ``gptq``, layers in stacks of blocks are expected to lose what it leaves of the loss.
    """
    windows = windows[:MOMENT_WINDOWS]
    ends = [name for name in (selection.embedding, selection.head) if name]
    watched = [*selection.linears, *([selection.head] if selection.head else [])]
    moments = collect_input_moments(model, windows, watched, progress, every_logit=True)
    fisher = output_fisher(model, windows, [*selection.linears, *ends], progress=progress)
    before = [predict(model, window) for window in windows[:TRIED_WINDOWS]]
    stacks = tuple(f"{path}." for path, _ in find_stacks(model, selection.linears))
    choices: dict[str, list[Choice[str]]] = {}
    parameters = 0

    def measured(smallest: Mapping[str, Tensor], names: Sequence[str], share: float = 1.0) -> None:
        """Scale the losses of ``names`` to what their smallest formats, all at once, do to predictions."""
        expected = sum(choices[name][0].loss for name in names)
        with _weights(model, smallest):
            pairs = zip(before, windows, strict=False)
            found = sum(divergence(old, predict(model, window)) for old, window in pairs) / len(before)
        # A divergence of nothing but rounding may even come out negative.
        scale = share * found / expected if expected > 0 and found > 0 else share
        for name in names:
            choices[name] = [replace(choice, loss=scale * choice.loss) for choice in choices[name]]

    with tqdm(
        total=len(selection.linears) + len(ends),
        desc="compare formats",
        unit="layer",
        delay=2,
        leave=False,
        disable=not progress,
    ) as bar:
        for names in _kinds(selection.linears):
            smallest: dict[str, Tensor] = {}
            for name in names:
                weight = weight_of(model.get_submodule(name))
                users = [(fisher.get(name), moments.get(name))]
                choices[name], smallest[name] = _choices(weight, users)
                parameters += weight.numel()
                bar.update()
            measured(smallest, names, GPTQ_LEAVES if gptq and names[0].startswith(stacks) else 1.0)
        if ends:
            table = weight_of(model.get_submodule(ends[0]))
            users = [_lookups(fisher, selection, table), _products(fisher, moments, selection)]
            copies = 1 if selection.tied else len(ends)
            choices[ends[0]], rounded = _choices(table, users, copies, SPLITS)
            smallest = {ends[0]: rounded}
            if copies > 1:
                own = weight_of(model.get_submodule(ends[1]))
                smallest[ends[1]] = quantized(own, FORMATS[MIXED_FORMATS[0]], users[1][1]).dequantized()
            parameters += copies * table.numel()
            measured(smallest, ends[:1], GPTQ_LEAVES if gptq else 1.0)
            bar.update(len(ends))
    followers = {second: first for first, second in pairs(model) if second in choices}
    for second, first in followers.items():
        both = zip(choices[first], choices.pop(second), strict=True)
        choices[first] = [replace(a, bytes=a.bytes + b.bytes, loss=a.loss + b.loss) for a, b in both]
    return Scan(choices, parameters, followers)


def plan_formats(scan: Scan, *, target_bpw: float | None = None, loss: float = 0.0) -> Plan:
    """The formats with the smallest expected loss at no more than ``target_bpw`` stored bits a weight.

    Scales and zero points count. No more bits are spent than bring the expected loss down to ``loss`` (nats a
    token). RecipeError where even the smallest formats cost more than ``target_bpw``.
    """
    budget = None if target_bpw is None else int(target_bpw * scan.parameters / 8)
    try:
        chosen = allocate(scan.choices, budget, loss)
    except ValueError as error:
        raise RecipeError(
            f"{target_bpw:.3g} bits a weight are too few: {error}.", "Allow more bits or a larger bundle."
        ) from error
    size = sum(choice.bytes for choice in chosen.values())
    formats = {name: choice.format for name, choice in chosen.items()}
    return Plan(
        formats=formats | {name: formats[other] for name, other in scan.with_others.items()},
        bytes=size,
        expected_loss=sum(choice.loss for choice in chosen.values()),
        bits_per_weight=8 * size / scan.parameters,
    )


def _kinds(names: Sequence[str]) -> list[list[str]]:
    """Names that are alike but for numbers: the same layer of all blocks."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "", name), []).append(name)
    return list(kinds.values())


def _choices(
    weight: Tensor, users: Sequence[User], copies: int = 1, splits: Mapping[str, Split] = MappingProxyType({})
) -> tuple[list[Choice[str]], Tensor]:
    """Each format with its bytes, for each copy stored, and its loss for all who read the weight; and the
    weight that the first and smallest of them leaves."""
    seen = [
        (fisher, importance) for fisher, importance in users if fisher is not None and importance is not None
    ]
    rows = len(weight)
    costs: dict[Integers, tuple[float, Tensor]] = {}  # bytes of a row, losses of rows
    smallest = weight
    for number, form in enumerate(FORMATS.values()):
        made = quantized(weight, form, seen[-1][1] if seen else None)
        left = made.dequantized()
        losses = sum((expected_losses(weight, left, *pair) for pair in seen), weight.new_zeros(rows).double())
        costs[form] = made.nbytes() / rows, losses
        smallest = smallest if number else left
    parts = {name: [(slice(0, rows), form)] for name, form in FORMATS.items()}
    parts |= {name: split.parts(rows) for name, split in splits.items()}
    found = []
    for name, each in parts.items():
        size = sum(costs[form][0] * (span.stop - span.start) for span, form in each)
        found.append(
            Choice(name, round(copies * size), sum(float(costs[form][1][span].sum()) for span, form in each))
        )
    return found, smallest


@contextmanager
def _weights(model: nn.Module, changed: Mapping[str, Tensor]) -> Iterator[None]:
    """The named layers have other weights while the block runs."""
    before = {name: weight_of(model.get_submodule(name)).clone() for name in changed}
    try:
        for name, weight in changed.items():
            weight_of(model.get_submodule(name)).copy_(weight)
        yield
    finally:
        for name, weight in before.items():
            weight_of(model.get_submodule(name)).copy_(weight)


def _lookups(fisher: dict[str, Tensor], selection: Selection, table: Tensor) -> User:
    """A look-up is a product of the table's transpose with a one-hot row.

    In the form of `expected_loss`, where rows are outputs: F_d and the row's share of look-ups change places.
    What a head predicts is what is looked up next, and its F_i = E[p_i (1 - p_i)] is about the share of a
    token; without a head every row is as likely.
    """
    found = fisher.get(selection.embedding or "")
    if found is None:
        return None, None
    share = fisher.get(selection.head or "")
    if share is None or len(share) != len(table) or not share.sum() > 0:
        share = torch.ones(len(table), dtype=torch.float64)
    return share / share.sum(), found


def _products(fisher: dict[str, Tensor], moments: dict[str, Tensor], selection: Selection) -> User:
    return fisher.get(selection.head or ""), moments.get(selection.head or "")
