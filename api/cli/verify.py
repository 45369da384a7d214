"""`gemini-edge verify`: is every byte of a bundle what its writer wrote?"""

import argparse
from typing import Any

from gemini.cli.inputs import A_BUNDLE, bundle_folder
from gemini.cli.output import megabytes

HELP = "Check every byte of a bundle against its manifest, and that nothing is missing, added or linked away."
EXAMPLE = "gemini-edge verify bundles/smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `verify`."""
    parser.add_argument("bundle", metavar="BUNDLE", type=bundle_folder, help=A_BUNDLE)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Read the bundle as the runtime would; a damaged one raises BundleError."""
    from gemini.runtime.bundle import read_bundle

    bundle = read_bundle(args.bundle)
    files, digest = bundle.manifest.files, bundle.manifest.digest
    size = sum(entry.size for entry in files.values())
    print(f"{args.bundle}: sound ({len(files)} files, {megabytes(size)}, {digest})")
    return {
        "bundle": str(args.bundle),
        "sound": True,
        "files": len(files),
        "bytes": size,
        "digest": digest,
    }
