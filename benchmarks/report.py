"""The report inside every bundle: report.json for machines, report.html and PNG plots for people.

The page is one file that opens offline, in light and in dark, and escapes every value it shows: names,
options and reasons come from checkpoints and recipes of others.
"""

import base64
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemini.benchmarks.metrics import (
    METRICS,
    NAMES,
    format_number,
    format_value,
    loss_percent,
    metric_label,
    table_columns,
)
from gemini.benchmarks.plots import DARK, LIGHT, draw_plots
from gemini.errors import UsageError

REPORT_SCHEMA = 1
ALTERNATIVES = {
    "size_accuracy.png": "Bars: size and accuracy of fp32, round-to-nearest and this bundle",
    "latency.png": "Histogram of the measured times with median and tail",
    "bytes.png": "Bars: bytes by component",
    "pareto.png": "Points: loss and time of every trial of the search, the Pareto front as a line",
}


def write_report(report: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write report.json, report.html and the plots into an existing folder; returns the paths written.

    report: the keys named in ``page_facts``; absent ones leave their section out. Raises UsageError when
    jinja2 or matplotlib is missing.
    """
    folder = Path(folder)
    plain = to_plain({"schema_version": REPORT_SCHEMA, **report})
    plots = draw_plots(plain, LIGHT)
    files = {"report.json": (json.dumps(plain, indent=2, allow_nan=False) + "\n").encode()}
    files["report.html"] = render_html(plain, plots, draw_plots(plain, DARK)).encode()
    for name, data in (files | plots).items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files | plots]


def to_plain(value: Any) -> Any:
    """Dataclasses, numpy values and paths as plain JSON types; NaN and infinity become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return to_plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int) else str(value)


def render_html(
    report: Mapping[str, Any],
    light: Mapping[str, bytes] | None = None,
    dark: Mapping[str, bytes] | None = None,
) -> str:
    """The page as one string. light, dark: {file name: PNG} for either colour scheme."""
    try:
        from jinja2 import Environment, FileSystemLoader
    except ImportError:
        raise UsageError(
            "The report page needs jinja2.", "Install it with: pip install 'gemini-edge[report]'."
        ) from None
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _show, "words": lambda key: str(key).replace("_", " ")}
    pictures = {
        name: {
            "light": _data_uri(png),
            "dark": _data_uri((dark or {}).get(name, png)),
            "alt": ALTERNATIVES[name],
        }
        for name, png in (light or {}).items()
    }
    return environment.get_template("report.html.j2").render(**page_facts(report), pictures=pictures)


def page_facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows, from the report's keys.

    name, task, recipe, table [{name, size_mb, metrics}], metric, drop_percent, max_drop, gate, passes,
    recovery, tuning, verification, latency, bytes, data, host, seconds {stage: s}, peak_rss_mb, memory,
    provenance, search. All optional.
    """
    table = list(report.get("table") or [])
    columns = table_columns(table)
    recovery = report.get("recovery") or {}
    figures = {key: value for key, value in recovery.items() if not isinstance(value, list | Mapping)}
    reference: Mapping[str, Any] = next((row for row in table if row.get("name") == "fp32"), {})
    recipe = report.get("recipe")
    return {
        "report": report,
        "recipe": recipe.get("name", "") if isinstance(recipe, Mapping) else recipe,
        "cards": _cards(report, table, reference),
        "headings": [metric_label(key) for key in columns],
        "rows": [_row(row, columns, reference) for row in table],
        "data": _flatten(report.get("data") or {}),
        "sections": [
            (title, facts)
            for title, facts in (
                ("Recovery", figures),
                ("Blocks by measurement", _tuning(report.get("tuning"))),
                ("Verification", report.get("verification")),
                ("Provenance", report.get("provenance")),
                ("Host", report.get("host")),
            )
            if facts
        ],
    }


def _row(row: Mapping[str, Any], columns: list[str], reference: Mapping[str, Any]) -> dict[str, Any]:
    cells = []
    for key in columns:
        note = ""
        if row is not reference and METRICS.get(key) and key in ("size_mb", "perplexity", "accuracy"):
            loss = loss_percent(key, row.get(key), reference.get(key))
            if loss is not None:
                change = -loss if METRICS[key].higher_is_better else loss
                note = f"{change:+.1f} %".replace("-", "−")
        cells.append({"value": format_value(key, row.get(key)), "note": note})
    name = str(row.get("name", ""))
    return {"name": NAMES.get(name, name), "bundle": name == "bundle", "cells": cells}


def _cards(
    report: Mapping[str, Any], table: list[Mapping[str, Any]], reference: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """(label, figure, remark) of what a reader wants first."""
    cards = []
    bundle: Mapping[str, Any] = next((row for row in table if row.get("name") == "bundle"), {})
    size, full = bundle.get("size_mb"), reference.get("size_mb")
    if size:
        cards.append(("Size", f"{size:,.1f} MB", f"{full / size:.1f} × smaller than fp32" if full else ""))
    key = report.get("metric")
    if key and bundle.get(key) is not None:
        remark = f"fp32 {format_value(key, reference[key])}" if reference.get(key) is not None else ""
        if report.get("drop_percent") is not None:
            remark += f", loss {report['drop_percent']:.1f} %"
        cards.append((metric_label(key), format_value(key, bundle[key]), remark.removeprefix(", ")))
    latency = report.get("latency") or {}
    if latency.get("decode_tokens_per_second"):
        remark = f"prefill {format_number(round(latency['prefill_tokens_per_second']))} tokens/s"
        cards.append(("Decoding", f"{latency['decode_tokens_per_second']:,.0f} tokens/s", remark))
    elif latency.get("points"):
        point = latency["points"][0]
        shape = f"batch {point['batch']}" + (f" × {point['tokens']} tokens" if point.get("tokens") else "")
        cards.append(("Latency", f"{point['ms']['p50']:.2f} ms", shape))
    if latency.get("peak_rss_mb") and latency.get("apart"):
        cards.append(("Peak memory", f"{latency['peak_rss_mb']:,.0f} MB", "resident, while serving"))
    return cards


def _flatten(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{"calibration": {"tokens": 9, ...}} -> [{"use": "calibration", "amount": "9 tokens", ...}]."""
    rows = []
    for use, facts in data.items():
        row = dict(facts) if isinstance(facts, Mapping) else {"name": facts}
        unit = next((key for key in ("tokens", "sentences", "images", "examples") if row.get(key)), None)
        amount = f"{format_number(row[unit])} {unit}" if unit else "–"
        rows.append({"use": use, "amount": amount, **row})
    return rows


def _tuning(tuning: Mapping[str, Any] | None) -> dict[str, str]:
    """Which blocks were chosen, and what each of those measured costs."""
    if not tuning:
        return {}
    costs = {
        each["name"]: f"{each['ms_per_token']:.2f} ms of products a token, {each['error']:.2f} x the error"
        for each in tuning["candidates"]
    }
    return {"chosen": tuning["chosen"]["name"], "portable": tuning["portable"]["name"], **costs}


def _show(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format_number(value) if isinstance(value, int | float) else str(value)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
