"""`gemini-edge bench`: how fast bundles are, side by side in one run, alone or beside other runtimes."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemini.cli.inputs import add_session_options, bundle_folder
from gemini.cli.output import columns_of_text
from gemini.errors import UsageError

HELP = (
    "Time bundles side by side, or beside other runtimes: first token, tokens a second, median and tail, "
    "memory, bandwidth."
)
EXAMPLE = "gemini-edge bench bundles/smollm2 bundles/smollm2-fp32 --threads 2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    parser.add_argument(
        "bundles",
        metavar="BUNDLE",
        nargs="*",
        type=bundle_folder,
        help="bundles of one task, timed in turn; the first sets the ratios",
    )
    parser.add_argument(
        "--prompt-tokens", metavar="N", type=int, default=128, help="tokens to read (default: 128)"
    )
    parser.add_argument(
        "--new-tokens", metavar="N", type=int, default=128, help="tokens to generate (default: 128)"
    )
    parser.add_argument(
        "--repeat", metavar="N", type=int, default=5, help="rounds, after one to warm up (default: 5)"
    )
    add_session_options(parser)
    peers = parser.add_argument_group("beside other runtimes")
    peers.add_argument(
        "--peers",
        metavar="FILE",
        help="TOML file of other runtimes to compare with, on the CPU or, with --device cuda, a GPU; `help` "
        "says how to set them up",
    )
    peers.add_argument(
        "--sweep",
        choices=("prompt", "batch", "threads"),
        action="append",
        help="with --peers: also vary the prompt length, the batch or the threads; may be repeated",
    )
    peers.add_argument(
        "--text", metavar="FILE", type=Path, help="with --peers: UTF-8 text for the perplexity"
    )
    peers.add_argument(
        "--windows",
        metavar="N",
        type=int,
        help="with --peers: stretches of 512 tokens of that text, 0 for no perplexity (default: 8)",
    )
    peers.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        help="with --peers: what one request may take before its runtime is given up (default: 300)",
    )
    peers.add_argument(
        "--output", metavar="DIR", type=Path, help="with --peers: folder for peers.json, peers.md and plots"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns everything measured, with host and versions."""
    if args.peers == "help":
        return _guide()
    if not args.bundles:
        raise UsageError("There is no bundle to time.", "Name one bundle folder or more.")
    common = {
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "threads": args.threads,
        "repeat": args.repeat,
    }
    asked = {name: getattr(args, name) for name in ("text", "windows", "timeout", "output")}
    given = {name: value for name, value in asked.items() if value is not None}
    if args.peers is not None:
        return _compare(args, common | given)
    if given or args.sweep:
        raise UsageError(
            f"--{min([*given, *(['sweep'] if args.sweep else [])])} needs --peers.", "Add --peers."
        )
    from gemini.benchmarks.bench import run_bench

    result = run_bench(args.bundles, **common, device=args.device)
    _show(result)
    return result


def _guide() -> dict[str, Any]:
    """How to set the peers up: the page beside the adapters."""
    from gemini.benchmarks.peers.field import SCRIPTS
    from gemini.benchmarks.peers.process import ADAPTERS

    print((ADAPTERS.parent / "README.md").read_text(encoding="utf-8").replace("$ADAPTERS", str(ADAPTERS)))
    return {"adapters": {name: str(ADAPTERS / script) for name, script in SCRIPTS.items()}}


def _compare(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    from gemini.benchmarks.peers.run import run_peers
    from gemini.benchmarks.peers.table import conditions, failures, sweep_tables, table_cells

    if args.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"The device {args.device!r} is unknown.", "Use cpu or cuda.")
    device = "cuda" if args.device == "cuda" else "cpu"
    result = run_peers(args.bundles, Path(args.peers), sweeps=args.sweep or (), device=device, **options)
    parts = [columns_of_text(table_cells(result)), "\n".join(failures(result)), sweep_tables(result)]
    print("\n\n".join(part for part in (*parts, conditions(result)) if part))
    return result


def _show(result: Mapping[str, Any]) -> None:
    bundles = result["bundles"]
    row = _generator_row if bundles[0]["latency"]["kind"] == "generator" else _batch_row
    rows = [row(bundle) for bundle in bundles]
    print(columns_of_text([list(rows[0]), *(list(row.values()) for row in rows)]))
    host = result["host"]
    print(
        f"\n{host['cpu']}, {bundles[0]['threads']} threads, "
        f"onnxruntime {host['packages'].get('onnxruntime')}; "
        f"prompt {result['prompt_tokens']}, new {result['new_tokens'] or 0}, {result['repeat']} rounds. "
        "Machines are noisy: compare within this table only."
    )


def _generator_row(bundle: Mapping[str, Any]) -> dict[str, str]:
    latency = bundle["latency"]
    share = latency["bandwidth_percent"]
    return {
        "bundle": bundle["path"],
        "MB": f"{bundle['size_mb']:.1f}",
        "first token ms": f"{latency['first_token_ms']['p50']:.1f}",
        "prefill tok/s": f"{latency['prefill_tokens_per_second']:.0f}",
        "decode tok/s": f"{latency['decode_tokens_per_second']:.1f}",
        "token ms p50": f"{latency['token_ms']['p50']:.2f}",
        "p90": f"{latency['token_ms']['p90']:.2f}",
        "p99": f"{latency['token_ms']['p99']:.2f}",
        "bandwidth": "-" if share is None else f"{share:.0f} %",
        "peak MB": f"{latency['peak_rss_mb']:.0f}",
        "speed": f"{bundle['ratio']['decode']:.2f} x",
    }


def _batch_row(bundle: Mapping[str, Any]) -> dict[str, str]:
    latency = bundle["latency"]
    (point,) = latency["points"]
    return {
        "bundle": bundle["path"],
        "MB": f"{bundle['size_mb']:.1f}",
        "ms p50": f"{point['ms']['p50']:.2f}",
        "p90": f"{point['ms']['p90']:.2f}",
        "p99": f"{point['ms']['p99']:.2f}",
        "items/s": f"{point['items_per_second']:.1f}",
        "peak MB": f"{latency['peak_rss_mb']:.0f}",
        "speed": f"{bundle['ratio']['speed']:.2f} x",
    }
