"""How results look: JSON for programs, tables for people."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def to_json(result: object) -> str:
    """`result` as one line of standard JSON; NaN and infinities, which JSON does not have, become null."""
    from gemini.benchmarks.report import to_plain

    return json.dumps(to_plain(result), allow_nan=False)


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The report's table: one row a model (``name``, ``size_mb``, metrics), headings and digits by metric."""
    from gemini.benchmarks.metrics import format_value, metric_label, table_columns

    columns = table_columns(list(rows))
    heads = ["", *map(metric_label, columns)]
    cells = [[str(row["name"]), *(format_value(key, row.get(key)) for key in columns)] for row in rows]
    return columns_of_text([heads, *cells])


def recovery_line(learned: Mapping[str, Any]) -> str:
    """What a recovery did, from its entry in the report."""
    found = f"{learned['before']:.4f} -> {learned['after']:.4f} nats a token from the teacher"
    return f"{found}, {learned['steps']} steps, {learned['minutes']:.1f} minutes"


def tuning_line(tuning: Mapping[str, Any]) -> str:
    """Which blocks were chosen and what that gains, from the report's entry."""
    own, chosen = tuning["portable"]["name"], tuning["chosen"]["name"]
    times = {each["name"]: f"{each['ms_per_token']:.2f} ms" for each in tuning["candidates"]}
    if chosen == own:
        return f"{own} stay, {times[own]} of products a token: none of {len(times) - 1} others takes less"
    return f"{chosen}, {times[chosen]} of products a token, instead of {own}, {times[own]}"


def memory_line(memory: Mapping[str, Any]) -> str:
    """Why weights were read from files, from the report's entry."""
    needed, limit = memory["needed_mb"] / 1e3, memory["limit_mb"] / 1e3
    return f"about {needed:.1f} GB with all weights in memory, {limit:.1f} may be held: read from files"


def columns_of_text(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells under a heading line; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in ruled
    )


def pairs(values: Mapping[str, Any], indent: str = "  ") -> str:
    """One `name  value` line each, values aligned."""
    width = max(map(len, values), default=0)
    return "\n".join(
        f"{indent}{name.ljust(width)}  {_cell(value)}".rstrip() for name, value in values.items()
    )


def megabytes(size: float) -> str:
    """Bytes in the unit the reports use (1 MB = 10^6 bytes)."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return str(value)
