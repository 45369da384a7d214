"""The metrics a table may hold: label, direction and format, in one place for table, plot and page."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """``form``: number of digits, or "percent" for shares of one."""

    label: str
    higher_is_better: bool
    form: int | str


METRICS = {
    "perplexity": Metric("Perplexity", False, 2),
    "kl": Metric("KL to fp32 (nats)", False, 4),
    "top1_agreement": Metric("Same top token", True, "percent"),
    "cosine_mean": Metric("Cosine, mean", True, 4),
    "cosine_min": Metric("Cosine, lowest", True, 4),
    "neighbour_agreement": Metric("Same neighbour", True, "percent"),
    "image_agreement": Metric("Same first word of images", True, "percent"),
    "agreement": Metric("Same decision", True, "percent"),
    "accuracy": Metric("Accuracy", True, "percent"),
    "logit_difference": Metric("Largest logit difference", False, 4),
    "bits_per_weight": Metric("Bits a weight", False, 2),
    "size_mb": Metric("Size (MB)", False, 1),
}
NAMES = {"fp32": "fp32", "round-to-nearest": "round-to-nearest", "bundle": "this bundle"}


def metric_label(key: str) -> str:
    """The label of a known metric; an unknown key reads as words."""
    return METRICS[key].label if key in METRICS else key.replace("_", " ").capitalize()


def format_value(key: str, value: Any) -> str:
    """A cell of the table: "–" for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    form = METRICS[key].form if key in METRICS else None
    if form == "percent":
        return f"{100 * value:.1f} %"
    if isinstance(form, int):
        return f"{value:,.{form}f}"
    return format_number(value)


def format_number(value: float) -> str:
    """Whole numbers whole, others with four significant digits."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def loss_percent(key: str, value: Any, reference: Any) -> float | None:
    """How much worse than fp32, in percent of fp32's value; None if that means nothing."""
    if not isinstance(value, int | float) or not isinstance(reference, int | float) or not reference:
        return None
    sign = -1 if key in METRICS and METRICS[key].higher_is_better else 1
    return sign * 100 * (value - reference) / abs(reference)


def table_columns(table: list[Mapping[str, Any]]) -> list[str]:
    """Keys of all rows but the name, size first, in the order they are first met."""
    keys = dict.fromkeys(key for row in table for key in row if key != "name")
    return sorted(keys, key=lambda key: key != "size_mb")
