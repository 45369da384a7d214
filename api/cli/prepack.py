"""`gemini-edge prepack`: weights packed once, so that processes that open the bundle need not do it."""

from __future__ import annotations

import argparse
from typing import Any

from gemini.cli.inputs import A_BUNDLE, bundle_folder
from gemini.cli.output import megabytes
from gemini.runtime.kernels import LAYOUTS

HELP = (
    "Add weights to a bundle as the runtime's own kernels read them: processes start faster and share their "
    "memory, and the bundle takes as much again on the disk."
)
EXAMPLE = "gemini-edge prepack bundles/smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prepack`."""
    parser.add_argument("bundle", metavar="BUNDLE", type=bundle_folder, help=A_BUNDLE)
    parser.add_argument(
        "--layout",
        choices=tuple(LAYOUTS),
        help="processors to pack for: those with AVX2, or those with AVX-512 VNNI (default: this one)",
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Pack and verify; a bundle without a graph for the own kernels raises BundleError."""
    from gemini.export.prepack import prepack
    from gemini.runtime.kernels import layout

    chosen = args.layout or layout()
    bundle = prepack(args.bundle, chosen, progress=not args.json)
    files = bundle.manifest.files
    names = bundle.manifest.packed_graphs[chosen].values()
    new = sorted({*names, *(file for name in names for file in bundle.opened_by(name))})
    size = sum(files[name].size for name in new)
    print(f"{args.bundle}: packed for {chosen} ({megabytes(size)} in {', '.join(new)})")
    return {
        "bundle": str(args.bundle),
        "layout": chosen,
        "files": new,
        "bytes": size,
        "digest": bundle.manifest.digest,
    }
