"""Put a comparison's table into a page: python -m gemini.benchmarks.peers README.md peers.json [--check]

The page marks the place with <!-- peers:begin --> and <!-- peers:end -->. With --check nothing is written;
exit code 2 says that the page's table is not the result's.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemini.benchmarks.page import read_page, update_page
from gemini.benchmarks.peers.compare import PEERS_SCHEMA
from gemini.benchmarks.peers.table import SECTION, markdown_table
from gemini.errors import GeminiEdgeError, UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; 0 when it holds the result's table."""
    parser = argparse.ArgumentParser(prog="python -m gemini.benchmarks.peers", description=__doc__)
    parser.add_argument("page", type=Path, metavar="PAGE.md")
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    try:
        table = markdown_table(_read_result(options.result))
        update_page(options.page, SECTION, table, check=options.check)
    except GeminiEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(read_page(path))
    except ValueError:
        result = None
    if not isinstance(result, dict) or "peers" not in result:
        raise UsageError(f"{path} is no comparison.", "Give the peers.json that `bench --peers` wrote.")
    if result.get("schema_version") != PEERS_SCHEMA:
        raise UsageError(f"{path} was written by another release.", "Run `gemini-edge bench --peers` again.")
    return result


if __name__ == "__main__":
    sys.exit(main())
