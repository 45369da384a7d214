"""A comparison as a table in Markdown."""

from collections.abc import Mapping
from typing import Any

from gemini.benchmarks.page import markdown_lines
from gemini.benchmarks.peers.sweeps import SWEEPS

SECTION = "peers"  # of the page that the table goes into
_HEADS = (
    "runtime", "size MB", "perplexity", "decode tokens/s", "prefill tokens/s", "start to first token ms",
    "peak MB", "of the bandwidth",
)  # fmt: skip


def table_cells(result: Mapping[str, Any]) -> list[list[str]]:
    """The heading and a line for each peer that was measured."""
    return [list(_HEADS), *(_row(peer) for peer in result["peers"] if peer["error"] is None)]


def failures(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each peer that was not."""
    return [f"{peer['name']}: not measured, {peer['error']}" for peer in result["peers"] if peer["error"]]


def markdown_table(result: Mapping[str, Any]) -> str:
    """The comparison's rows, failed ones with their reason below, and the conditions."""
    head, *rows = table_cells(result)
    table = markdown_lines([head, *(map(_text, row) for row in rows)])
    failed = "\n".join(f"- {_text(line)}" for line in failures(result))
    return "\n\n".join(part for part in (table, failed, _text(conditions(result))) if part)


def conditions(result: Mapping[str, Any]) -> str:
    """One paragraph: what was measured how, on what, with which versions."""
    host, peers = result["host"], [peer for peer in result["peers"] if not peer["error"]]
    versions = {name: version for peer in reversed(peers) for name, version in peer["versions"].items()}
    scored = max((peer["scored_tokens"] for peer in peers), default=0)
    commit = f", commit {host['commit']}" if host.get("commit") else ""
    speed = result["read_gib_per_second"]
    machine = [host.get("gpu"), host["cpu"], _count(result["threads"], "thread")]
    machine += [f"reading {speed:.1f} GiB/s"] if speed else []
    sentences = [
        f"{', '.join(filter(None, machine))}{commit}.",
        f"A prompt of {_count(result['prompt_tokens'], 'token')} and {result['new_tokens']} more, greedy.",
        f"Medians of {_count(result['repeat'], 'round')}, interleaved; in parentheses how many times as fast "
        "as the first row, round by round.",
        *([f"Perplexity over {scored:,} tokens of {result['text']['name']}."] if scored else []),
        f"Versions: {', '.join(f'{name} {versions[name]}' for name in sorted(versions))}.",
    ]
    return " ".join(sentences)


def sweep_tables(result: Mapping[str, Any]) -> str:
    """A table for each sweep: prefill and decode rates of every peer at every value."""
    parts = []
    for kind in SWEEPS:
        if not (series := (result.get("sweeps") or {}).get(kind)):
            continue
        values = sorted({point[kind] for one in series for point in one["points"]})
        lines = [[f"tokens/s by {kind}", *map(str, values)]]
        for one in series:
            for rate in ("prefill", "decode"):
                found = {point[kind]: point[f"{rate}_tokens_per_second"] for point in one["points"]}
                cells = [f"{found[value]:.1f}" if value in found else "–" for value in values]
                lines.append([f"{_text(one['name'])}, {rate}", *cells])
        left = [f"- {_text(one['name'])} left: {_text(one['error'])}" for one in series if one["error"]]
        parts += [markdown_lines(lines), *(["\n".join(left)] if left else [])]
    return "\n\n".join(parts)


def _row(peer: Mapping[str, Any]) -> list[str]:
    latency, ratio = peer["latency"], peer.get("ratio") or {}
    start = peer["start_to_first_token_ms"]
    share = latency["bandwidth_percent"]
    return [
        peer["name"],
        f"{peer['size_mb']:.1f}",
        "–" if peer["perplexity"] is None else f"{peer['perplexity']:.2f}",
        f"{latency['decode_tokens_per_second']:.1f}" + _times(ratio.get("decode")),
        f"{latency['prefill_tokens_per_second']:.0f}" + _times(ratio.get("prefill")),
        "–" if start is None else f"{start['p50']:.0f}" + _times(ratio.get("start")),
        f"{latency['peak_rss_mb']:.0f}",
        "–" if share is None else f"{share:.0f} %",
    ]


def _times(ratio: Mapping[str, float] | None) -> str:
    return f" ({ratio['p50']:.2f} ×)" if ratio else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _text(value: Any) -> str:
    """A name or reason of others inside a table: no bar, no markup, one line."""
    words = " ".join(str(value).split())
    return "".join(f"\\{letter}" if letter in "|<>`*[]\\" else letter for letter in words)
