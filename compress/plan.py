"""Mixed precision: which layer gets which format, when a weight may cost so many bits on average.

    plan = plan_formats(model, selection, windows, target_bpw=5.0)
    plan.formats["model.layers.0.mlp.up_proj"]      # Integers(4, 32, ...)

A format's price is its stored bytes, its loss the divergence that `gemini.compress.sensitivity` expects of
the weight it would leave; `gemini.compress.allocate` spends the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gemini.compress.allocate import Choice, allocate
from gemini.compress.calibrate import Window, collect_input_moments
from gemini.compress.layers import Integers, quantized
from gemini.compress.select import Selection, weight_of
from gemini.compress.sensitivity import expected_loss, output_fisher
from gemini.errors import RecipeError

FORMATS = (
    Integers(4, 64, symmetric=False, search=True),
    Integers(4, 32, symmetric=False, search=True),
    Integers(8, 64),
)
User = tuple[Tensor | None, Tensor | None]  # of a weight: F of its outputs, E[x^2] of its inputs
_TABLE = "token embedding and head"


@dataclass(frozen=True)
class Plan:
    """The formats chosen, the moments E[x^2] they were chosen by, and the loss that is expected of them."""

    formats: dict[str, Integers]
    table: Integers | None
    moments: dict[str, Tensor]
    expected_loss: float  # nats a token
    bits_per_weight: float


def plan_formats(
    model: nn.Module,
    selection: Selection,
    windows: Sequence[Window],
    target_bpw: float,
    progress: bool = True,
) -> Plan:
    """The formats with the smallest expected loss at no more than ``target_bpw`` stored bits a weight.

    Scales and zero points count. A layer that calibration never reached is taken to lose nothing.
    RecipeError where even the smallest formats cost more.
    """
    ends = [name for name in (selection.embedding, selection.head) if name]
    watched = [*selection.linears, *([selection.head] if selection.head else [])]
    moments = collect_input_moments(model, windows, watched, progress, every_logit=True)
    fisher = output_fisher(model, windows, [*selection.linears, *ends], progress=progress)
    choices: dict[str, list[Choice[Integers]]] = {}
    for name in tqdm(
        selection.linears, desc="compare formats", unit="layer", delay=2, leave=False, disable=not progress
    ):
        weight = weight_of(model.get_submodule(name))
        choices[name] = [_choice(form, weight, [(fisher.get(name), moments.get(name))]) for form in FORMATS]
    parameters = sum(weight_of(model.get_submodule(name)).numel() for name in selection.linears)
    if ends:
        table = weight_of(model.get_submodule(ends[0]))
        users = [_lookups(fisher, selection, table), _products(fisher, moments, selection)]
        copies = 1 if selection.tied else len(ends)
        choices[_TABLE] = [_choice(form, table, users, copies) for form in FORMATS]
        parameters += copies * table.numel()
    try:
        chosen = allocate(choices, int(target_bpw * parameters / 8))
    except ValueError as error:
        raise RecipeError(
            f"{target_bpw} bits a weight are too few: {error}.", "Raise `target_bpw`."
        ) from error
    table_choice = chosen.pop(_TABLE, None)
    everything = [*chosen.values(), *([table_choice] if table_choice else [])]
    return Plan(
        formats={name: choice.format for name, choice in chosen.items()},
        table=table_choice.format if table_choice else None,
        moments=moments,
        expected_loss=sum(choice.loss for choice in everything),
        bits_per_weight=8 * sum(choice.bytes for choice in everything) / parameters,
    )


def _choice(form: Integers, weight: Tensor, users: Sequence[User], copies: int = 1) -> Choice[Integers]:
    """A format with its bytes, for each copy stored, and its loss for all who read the weight."""
    seen = [
        (fisher, importance) for fisher, importance in users if fisher is not None and importance is not None
    ]
    made = quantized(weight, form, seen[-1][1] if seen else None)
    approximation = made.dequantized()
    return Choice(
        form, copies * made.nbytes(), sum(expected_loss(weight, approximation, *pair) for pair in seen)
    )


def _lookups(fisher: dict[str, Tensor], selection: Selection, table: Tensor) -> User:
    """A look-up is a product of the table's transpose with a one-hot row; here, every row is as likely.

    In the form of `expected_loss`, where rows are outputs: F_d and the row's share change places.
    """
    found = fisher.get(selection.embedding or "")
    if found is None:
        return None, None
    return torch.full((len(table),), 1 / len(table), dtype=torch.float64), found


def _products(fisher: dict[str, Tensor], moments: dict[str, Tensor], selection: Selection) -> User:
    return fisher.get(selection.head or ""), moments.get(selection.head or "")
