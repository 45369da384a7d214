"""Several bundles of one task timed side by side: A B A B in one process, medians and ratios.

Machines are noisy, and only ratios inside one run mean anything; so every repeat visits every bundle in turn.
Command: python -m gemini.benchmarks.bench BUNDLE... (the last line of its output is JSON).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gemini.benchmarks.contestants import Contestant, bytes_per_token, check_length, open_contestant
from gemini.benchmarks.host import host_facts
from gemini.benchmarks.latency import Ceiling, summarize, summarize_batches, time_calls
from gemini.benchmarks.resources import folder_bytes, read_bandwidth
from gemini.errors import GeminiEdgeError, UsageError
from gemini.runtime.bundle import read_bundle
from gemini.runtime.schema import EncoderModel

BENCH_SCHEMA = 1
WARMUP = 1
CALLS_PER_ROUND = 5
PAUSE = 0.02  # seconds; the worker threads of the bundle before spin for a moment after their last operator


def run_bench(
    bundles: Sequence[Path],
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    threads: int | None = None,
    repeat: int = 5,
    device: str = "auto",
) -> dict[str, Any]:
    """Time the bundles interleaved; the first is what the ratios of the others refer to.

    Generators: a random prompt of ``prompt_tokens`` and ``new_tokens`` greedy tokens, ``repeat`` times each
    after one to warm up. Encoders: one row of ``prompt_tokens`` tokens; image models: one image. Returns
    plain JSON types. Raises UsageError for counts below one or bundles of different tasks, BundleError for
    damaged ones.
    """
    for name, value in (("prompt tokens", prompt_tokens), ("new tokens", new_tokens), ("repeats", repeat)):
        if value < 1:
            raise UsageError(f"The number of {name} is {value}.", "Use 1 or more.")
    if not bundles:
        raise UsageError("There is no bundle to time.", "Name one bundle folder or more.")
    opened = [read_bundle(path) for path in bundles]
    tasks = sorted({bundle.manifest.task for bundle in opened})
    if len(tasks) > 1:
        raise UsageError(
            f"Bundles of different tasks ({', '.join(tasks)}) have no common time.", "Time one task a run."
        )
    for bundle in opened:
        check_length(bundle, prompt_tokens, new_tokens)
    with ExitStack() as stack:
        field = [
            open_contestant(bundle, prompt_tokens, new_tokens, threads, device, stack) for bundle in opened
        ]
        times = _interleave(field, repeat)
        results = [_result(one, taken, prompt_tokens) for one, taken in zip(field, times, strict=True)]
    for result in results:
        result["ratio"] = _ratios(result["latency"], results[0]["latency"])
    return {
        "schema_version": BENCH_SCHEMA,
        "task": tasks[0],
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens if field[0].generate is not None else None,
        "repeat": repeat,
        "warmup": WARMUP,
        "host": host_facts(field[0].threads, field[0].device),
        "bundles": results,
    }


def _interleave(field: Sequence[Contestant], repeat: int) -> list[list[Any]]:
    """Times of each contestant: Runs for generators, seconds of single calls for the others."""
    times: list[list[Any]] = [[] for _ in field]
    for index in range(WARMUP + repeat):
        for one, taken in zip(field, times, strict=True):
            time.sleep(PAUSE)
            if one.generate is not None:
                new: list[Any] = [one.generate()]
            else:
                assert one.call is not None
                new = time_calls(one.call, CALLS_PER_ROUND, 1)
            if index >= WARMUP:
                taken.extend(new)
    return times


def _result(one: Contestant, times: list[Any], prompt_tokens: int) -> dict[str, Any]:
    manifest = one.bundle.manifest
    if one.generate is not None:
        size = bytes_per_token(one.bundle)
        ceiling = Ceiling(size, read_bandwidth(size, one.threads)) if one.device == "cpu" else None
        latency = summarize(times, prompt_tokens, WARMUP, ceiling).to_dict()
    else:
        tokens = prompt_tokens if isinstance(manifest.model, EncoderModel) else None
        latency = summarize_batches({(1, tokens): times}, WARMUP).to_dict()
    return {
        "name": manifest.name,
        "path": str(one.bundle.path),
        "digest": manifest.digest,
        "size_mb": folder_bytes(one.bundle.path) / 1e6,
        "threads": one.threads,
        "device": one.device,
        "latency": latency,
    }


def _ratios(latency: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, float]:
    """How many times as fast as the first bundle."""
    if latency["kind"] == "generator":
        keys = ("prefill_tokens_per_second", "decode_tokens_per_second")
        return {key.split("_")[0]: latency[key] / first[key] for key in keys}
    return {"speed": first["points"][0]["ms"]["p50"] / latency["points"][0]["ms"]["p50"]}


def measure_apart(
    bundle: str | Path,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    threads: int | None = None,
    repeat: int = 3,
) -> dict[str, Any]:
    """The latency of one bundle, measured in a process of its own that imports nothing but the runtime.

    So its peak memory is what a device would see, not what the compressing process held before. Returns a
    ``LatencyReport`` or ``BatchLatencyReport`` as a dict, with ``"apart": True``, without which the report's
    page shows no serving memory. Raises UsageError with the child's message.
    """
    # -P: started in a checkout's root, `-m` would offer its folders for import by their bare names.
    command = [sys.executable, "-P", "-m", "gemini.benchmarks.bench", str(bundle)]
    command += [f"--prompt-tokens={prompt_tokens}", f"--new-tokens={new_tokens}", f"--repeat={repeat}"]
    command += ["--threads", str(threads)] if threads else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UsageError(f"The bundle could not be timed ({reason}).", "Run `gemini-edge bench` on it.")
    latency: dict[str, Any] = json.loads(lines[-1])["bundles"][0]["latency"]
    return latency | {"apart": True}


def main(arguments: Sequence[str] | None = None) -> int:
    """Time bundles and print the result as one line of JSON; 0 when done, the error's exit code otherwise."""
    parser = argparse.ArgumentParser(prog="python -m gemini.benchmarks.bench", description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args(arguments)
    try:
        result = run_bench(**vars(options))
    except GeminiEdgeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
