"""The table of docs/compression.md from what was measured.

python -m gemini.benchmarks.guide PAGE.md MEASURED.json [MEASURED.json ...] [--check]

Each file is the last line that `gemini-edge eval BUNDLE... --reference FP32 --json` or
`gemini-edge bench BUNDLE... --json` printed. The page marks the place with <!-- measured:begin --> and
<!-- measured:end -->. With --check nothing is written; exit code 2 says that the page is stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemini.benchmarks.page import markdown_lines, read_page, update_page
from gemini.errors import GeminiEdgeError, UsageError

SECTION = "measured"
Column = dict[str, str]  # bundle -> cell


def measured_rows(results: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """The heading, then a row for each bundle: megabytes, loss and divergence on each text, tokens a second.

    Bundles are known by the names of their folders. UsageError for results of another kind.
    """
    sizes: dict[str, float] = {}
    columns: dict[str, Column] = {}
    for result in results:
        if "table" in result:
            for row in result["table"]:
                sizes.setdefault(Path(row["name"]).name, row["size_mb"])
            found = _losses(result)
        elif "bundles" in result:
            found = _rates(result)
        else:
            raise UsageError("A file holds no result of eval or bench.", "Give what --json printed last.")
        for heading, column in found.items():
            columns.setdefault(heading, {}).update(column)
    rows = [
        [name, f"{size:.1f}", *(column.get(name, "–") for column in columns.values())]
        for name, size in sizes.items()
    ]
    return [["bundle", "MB", *columns], *rows]


def _losses(result: Mapping[str, Any]) -> dict[str, Column]:
    """Percent of perplexity over the reference, whose own is given as it is, and divergence."""
    reference, *rows = result["table"]
    if not rows or any("perplexity" not in row or "kl" not in row for row in rows):
        raise UsageError("Generators were not measured against a reference.", "Run eval with --reference.")
    text = "built-in text" if result["text"] == "built-in" else Path(result["text"]).stem
    loss = {Path(reference["name"]).name: f"{reference['perplexity']:.2f}"}
    for row in rows:
        change = 100 * (row["perplexity"] / reference["perplexity"] - 1)
        loss[Path(row["name"]).name] = f"{change:+.1f} %"
    nats = {Path(row["name"]).name: f"{row['kl']:.4f}" for row in result["table"]}
    return {f"perplexity, {text}": loss, f"divergence, {text}": nats}


def _rates(result: Mapping[str, Any]) -> dict[str, Column]:
    if any(row["latency"]["kind"] != "generator" for row in result["bundles"]):
        raise UsageError("The bundles that were timed generate no text.", "Time generators.")
    return {
        f"{part} tokens/s": {
            Path(row["path"]).name: f"{row['latency'][f'{part}_tokens_per_second']:.0f}"
            for row in result["bundles"]
        }
        for part in ("decode", "prefill")
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; 0 when it holds the table of these results."""
    parser = argparse.ArgumentParser(prog="python -m gemini.benchmarks.guide", description=__doc__)
    parser.add_argument("page", type=Path, metavar="PAGE.md")
    parser.add_argument("results", type=Path, metavar="MEASURED.json", nargs="+")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    try:
        rows = measured_rows(_read_result(path) for path in options.results)
        update_page(options.page, SECTION, markdown_lines(rows), check=options.check)
    except GeminiEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _read_result(path: Path) -> Mapping[str, Any]:
    try:
        result = json.loads(read_page(path).rstrip().rpartition("\n")[2])
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise UsageError(f"{path} is no result of --json.", "Give the last line of its output.")
    return result


if __name__ == "__main__":
    sys.exit(main())
