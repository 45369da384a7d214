"""`gemini-edge inspect`: what a bundle holds, from its verified manifest alone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from gemini.cli.inputs import A_BUNDLE, bundle_folder
from gemini.cli.output import megabytes, pairs, results_table
from gemini.errors import BundleError

if TYPE_CHECKING:
    from gemini.runtime.bundle import Bundle

HELP = (
    "Show what a bundle holds: graphs, operators, bytes by component, recipe, provenance, measured results."
)
EXAMPLE = "gemini-edge inspect bundles/smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `inspect`."""
    parser.add_argument("bundle", metavar="BUNDLE", type=bundle_folder, help=A_BUNDLE)
    parser.add_argument(
        "--report", action="store_true", help="only the measured results and where the report lies"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Verify the bundle, print its manifest in sections; returns the manifest and the report's table."""
    from gemini.runtime.bundle import read_bundle

    bundle = read_bundle(args.bundle)
    manifest = dict(bundle.manifest.raw)
    rows = _results(bundle)
    if not args.report:
        _show(manifest)
    if rows:
        print(results_table(rows))
        print(f"\nreport  {bundle.path / 'report.html'}")
    return {"manifest": manifest, "table": rows}


def _results(bundle: Bundle) -> list[dict[str, Any]]:
    """The rows of the before/after table; none for a bundle that was written without a report."""
    if not bundle.has("report.json"):
        return []
    report = bundle.json("report.json")
    rows = report.get("table", []) if isinstance(report, dict) else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise BundleError("The table in report.json is malformed.", "Compress the model again.")
    return rows


def _show(manifest: dict[str, Any]) -> None:
    sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
    requirements = manifest.get("requirements", {})
    overview = {
        "name": manifest["name"],
        "task": manifest["task"],
        "recipe": (manifest.get("recipe") or {}).get("name"),
        "size": f"{megabytes(sum(sizes.values()))} in {len(sizes)} files",
        "graphs": [
            f"{file} ({megabytes(sizes.get(file, 0))})"
            for named in (
                *(manifest.get(kind, {}) for kind in ("graphs", "half_graphs", "fused_graphs")),
                *manifest.get("packed_graphs", {}).values(),
            )
            for file in named.values()
        ],
        "onnxruntime": f">= {requirements['onnxruntime']}" if "onnxruntime" in requirements else None,
        "digest": manifest["digest"],
    }
    print(pairs(overview, indent=""))
    _section("operators", dict.fromkeys(requirements.get("operators", []), ""))
    _section("fusions", manifest.get("fusions"))
    _section("bytes by component", {k: megabytes(v) for k, v in (manifest.get("bytes") or {}).items()})
    _section("model", manifest.get("model"))
    _section("generation", manifest.get("generation"))
    for report in manifest.get("passes") or []:
        _section(f"pass {report['type']}", _pass_summary(report))
    _section("provenance", manifest.get("provenance"))
    print()


def _pass_summary(report: dict[str, Any]) -> dict[str, Any]:
    layers, skipped = report.get("layers", []), report.get("skipped", [])
    summary = {**report.get("options", {}), "layers": len(layers)}
    if "bits_per_weight" in report:
        summary["bits per weight"] = report["bits_per_weight"]
    return summary | {f"skipped {entry['name']}": entry["reason"] for entry in skipped}


def _section(title: str, values: dict[str, Any] | None) -> None:
    """One heading with its pairs; nested values on one line, long lists by their length."""
    if not values:
        return
    shown: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            shown |= {f"{name} {inner}": item for inner, item in value.items()}
        elif isinstance(value, list) and len(value) > 8:
            shown[name] = f"{len(value)} entries"
        else:
            shown[name] = value
    print(f"\n{title}\n{pairs(shown)}")
