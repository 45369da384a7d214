"""`gemini-edge doctor`: what this machine and this installation can do, and what stands in the way."""

import argparse
import operator
import os
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distributions, requires
from typing import Any

from gemini.cli.output import pairs
from gemini.errors import DeviceError

HELP = "Show versions, providers, usable threads, processor features, what is missing or in the way."
EXAMPLE = "gemini-edge doctor"

DISTRIBUTION = "gemini-edge"
# Both unpack into the same folder `onnxruntime`: whichever came last wins, and half of the other stays.
CLASHING = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
_COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "<": operator.lt, ">": operator.gt}
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?\s*([^;]*)(?:;(.*))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`doctor` has no options of its own."""


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Collect and print the findings; a broken onnxruntime is a finding, not a failure."""
    from gemini.benchmarks.host import host_facts

    installed = installed_versions()
    facts: dict[str, Any] = {
        "host": host_facts(),
        **runtime_facts(),
        "clashes": clashes(installed),
        "missing": missing_by_extra(_requirements(), installed),
    }
    facts["problems"] = problems(facts)
    _show(facts)
    return facts


def runtime_facts() -> dict[str, Any]:
    """Providers, threads and the state of telemetry, as the runtime sees them."""
    facts: dict[str, Any] = {"threads": None, "providers": []}
    try:
        from gemini.runtime.threads import affinity_count, cpu_quota, usable_threads

        facts["threads"] = {
            "usable": usable_threads(),
            "affinity": affinity_count(),
            "cgroup_quota": cpu_quota(),
        }
        import onnxruntime

        facts["providers"] = list(onnxruntime.get_available_providers())
    except (ImportError, AttributeError) as error:  # two wheels in one folder can leave an empty package
        facts["onnxruntime_error"] = str(error)
    facts["telemetry"] = "off" if os.environ.get("ORT_DISABLE_TELEMETRY") == "1" else "on"
    return facts


def installed_versions() -> dict[str, str]:
    """{normalised name: version} of everything installed."""
    return {normalised(found.metadata["Name"] or ""): found.version for found in distributions()}


def clashes(installed: Mapping[str, str]) -> list[str]:
    """The onnxruntime wheels that overwrite each other; empty with fewer than two."""
    found = [name for name in CLASHING if name in installed]
    return found if len(found) > 1 else []


def missing_by_extra(requirements: Iterable[str], installed: Mapping[str, str]) -> dict[str, list[str]]:
    """{extra: what is not installed or too old}; "" stands for what the runtime itself needs.

    requirements: lines of the metadata field Requires-Dist (PEP 508) whose only marker is ``extra == "…"``.
    """
    wanted: dict[str, list[str]] = {"": []}
    for line in requirements:
        match = _REQUIREMENT.match(line)
        if match is None:
            continue
        name, _, bounds, marker = match.groups()
        extra = _EXTRA.search(marker or "")
        lacking = wanted.setdefault(extra.group(1) if extra else "", [])
        if normalised(name) == DISTRIBUTION:  # an extra made of other extras
            continue
        # Any of the wheels that carry onnxruntime will do.
        names = CLASHING if normalised(name) == "onnxruntime" else (normalised(name),)
        version = next((installed[each] for each in names if each in installed), None)
        if version is None:
            lacking.append(f"{name}{bounds.strip()}")
        elif not within(version, bounds):
            lacking.append(f"{name}{bounds.strip()} (installed: {version})")
    return wanted


def within(version: str, bounds: str) -> bool:
    """Whether the release number of `version` keeps bounds like ">=1.2,<2"; ``!=`` and ``~=`` are ignored."""
    here = _release(version)
    for symbol, limit in re.findall(r"(>=|<=|==|<|>)\s*([0-9][^,\s]*)", bounds):
        there = _release(limit)
        width = max(len(here), len(there))
        left, right = (number + (0,) * (width - len(number)) for number in (here, there))
        if not _COMPARE[symbol](left, right):
            return False
    return True


def problems(facts: Mapping[str, Any]) -> list[str]:
    """What should be mended, each with its remedy."""
    found = []
    if facts["clashes"]:
        names = facts["clashes"]
        found.append(
            f"{' and '.join(names)} overwrite each other. "
            f"Run: pip uninstall {' '.join(names)}, then install one of them."
        )
    if "onnxruntime_error" in facts:
        found.append(f"onnxruntime cannot be used ({facts['onnxruntime_error']}). Install it again.")
    if facts["missing"].get(""):
        found.append(f"The runtime lacks {', '.join(facts['missing'][''])}. Run: pip install {DISTRIBUTION}")
    if facts["telemetry"] != "off":
        found.append("onnxruntime's telemetry is on. Set ORT_DISABLE_TELEMETRY=1.")
    return found


def normalised(name: str) -> str:
    """A distribution name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


def _requirements() -> list[str]:
    try:
        return requires(DISTRIBUTION) or []
    except PackageNotFoundError as error:
        raise DeviceError(
            f"{DISTRIBUTION} is not installed here.", "Run `make setup` or pip install it."
        ) from error


def _show(facts: Mapping[str, Any]) -> None:
    host = facts["host"]
    print(
        pairs(
            {
                "gemini-edge": host["gemini_edge"],
                "python": host["python"],
                "system": host["system"],
                "processor": host["cpu"],
                "kernel features": host["instructions"] or "none that quantized kernels use",
                "own kernels": host["own_kernels"],
                "threads": _thread_line(facts["threads"]),
                "memory": f"{host['memory_gib']} GiB",
                "providers": facts["providers"],
                "telemetry": facts["telemetry"],
            },
            indent="",
        )
    )
    print(f"\npackages\n{pairs(host['packages'])}")
    lacking = {name or "runtime": names or "complete" for name, names in facts["missing"].items()}
    print(f"\nmissing, by extra\n{pairs(lacking)}")
    print(
        "\n" + "\n".join(f"problem: {line}" for line in facts["problems"])
        if facts["problems"]
        else "\nno problems"
    )


def _thread_line(threads: Mapping[str, Any] | None) -> str | None:
    if threads is None:
        return None
    quota = "none" if threads["cgroup_quota"] is None else f"{threads['cgroup_quota']:g} CPUs"
    return f"{threads['usable']} (affinity {threads['affinity']}, cgroup quota {quota})"
