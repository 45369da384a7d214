"""What a search leaves: search.json, search.md and pareto.png, and the winner as a bundle that names it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemini.benchmarks.metrics import metric_label
from gemini.benchmarks.plots import draw_plots
from gemini.benchmarks.report import to_plain, write_report
from gemini.export.bundle import commit, staging, write_manifest
from gemini.runtime.bundle import read_bundle

PLOT = "pareto.png"


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write the three files, each in place of an older one at once."""
    plain = to_plain(results)
    plots = draw_plots({"search": plain})
    files = {"search.json": json.dumps(plain, indent=1).encode(), "search.md": markdown(plain).encode()}
    for name, data in (files | plots).items():
        unfinished = folder / f".{name}.partial"
        unfinished.write_bytes(data)
        os.replace(unfinished, folder / name)


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a page: what was asked, the table, what is on the front and why trials are missing."""
    lines = ["| " + " | ".join(row) + " |" for row in table(results)]
    lines.insert(1, "| --- |" + " ---: |" * 3 + " --- |")
    limits = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in _limits(results).items())
    loss = f"Loss in percent of fp32's {metric_label(results['metric']).lower()}"
    notes = [
        f"# {results['name']}: {results['winner'] or 'nothing within the limits'}",
        f"Limits: {limits}. {loss}; milliseconds for {results['time_of']}.",
        "\n".join(lines),
        f"![Loss and time of every trial]({PLOT})",
    ]
    return "\n\n".join(notes) + "\n"


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """Heading and a row for every trial: name, size, loss, time, remark."""
    rows = [["trial", "MB", "loss %", "ms", "remark"]]
    for row in results["rows"]:
        if row["latency_ms"] is None:
            figures = ["–", "–", "–"]
        else:
            figures = [f"{row['size_mb']:.1f}", f"{row['loss_percent']:.2f}", f"{row['latency_ms']:.2f}"]
        remark = "winner" if row["winner"] else "front" if row["front"] else ""
        if row["latency_ms"] is None:
            remark = f"{row['state']}: {row['why']}"
        rows.append([row["trial"], *figures, remark])
    return rows


def _limits(results: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in results["limits"].items() if value is not None}


def keep_winner(trial: Path, output: Path, results: Mapping[str, Any]) -> None:
    """Put a copy of the winning trial's bundle at ``output``; its report and manifest say what it won."""
    allowed = results["limits"]["loss_percent"]
    gate = {"max_drop": allowed, "gate": "not set" if allowed is None else "passed"}
    won = read_bundle(trial)
    manifest = dict(won.manifest.raw)
    report = won.json("report.json") | gate | {"search": to_plain(results), "latency": results["latency"]}
    report["search"].pop("latency")
    manifest["metrics"] |= gate
    manifest["search"] = {
        "winner": results["winner"],
        "source": results["source"],
        "limits": _limits(results),
        "trials": len(results["rows"]),
        "front": [row["trial"] for row in results["rows"] if row["front"]],
    }
    with staging(output) as folder:
        for name in manifest.pop("files"):
            shutil.copyfile(trial / name, folder / name)
        write_report(report, folder)
        write_manifest(folder, manifest)
        commit(folder, output)
