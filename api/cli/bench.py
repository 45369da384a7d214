"""`gemini-edge bench`: how fast bundles are, side by side in one run."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemini.cli.output import columns_of_text

HELP = "Time bundles side by side: first token, tokens a second, median and tail, memory, bandwidth."
EXAMPLE = "gemini-edge bench bundles/smollm2 bundles/smollm2-fp32 --threads 2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    parser.add_argument(
        "bundles",
        metavar="BUNDLE",
        nargs="+",
        type=Path,
        help="bundles of one task, timed in turn; the first sets the ratios",
    )
    parser.add_argument(
        "--prompt-tokens", metavar="N", type=int, default=128, help="tokens to read (default: 128)"
    )
    parser.add_argument(
        "--new-tokens", metavar="N", type=int, default=128, help="tokens to generate (default: 128)"
    )
    parser.add_argument(
        "--threads", metavar="N", type=int, help="threads (default: what cgroup and affinity allow)"
    )
    parser.add_argument(
        "--repeat", metavar="N", type=int, default=5, help="rounds, after one to warm up (default: 5)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns everything measured, with host and versions."""
    from gemini.benchmarks.bench import run_bench

    result = run_bench(
        args.bundles,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        threads=args.threads,
        repeat=args.repeat,
        device=args.device,
    )
    _show(result)
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
