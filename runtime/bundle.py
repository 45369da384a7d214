"""Reading a bundle defensively: after :func:`read_bundle` every listed byte is what its writer wrote.

bundle = read_bundle("out/")          # BundleError with cause and remedy, or a verified Bundle
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from gemini.errors import BundleError
from gemini.runtime.background import Background
from gemini.runtime.external_data import check_external_data
from gemini.runtime.fields import damaged
from gemini.runtime.kernels import graphs_here
from gemini.runtime.manifest import MAX_MANIFEST_BYTES, parse_manifest, seal
from gemini.runtime.schema import Manifest

__all__ = ["Bundle", "file_digest", "hashed_meanwhile", "read_bundle", "safe_member", "seal"]

MANIFEST_NAME = "manifest.json"
_MAX_TEXT_BYTES = 256 << 20
_PIECE = 4 << 20
_WEIGHTS = ".onnx.data"
_COMPANIONS = {
    "decoder": "tokenizer.json",
    "encoder": "tokenizer.json",
    "vision": "preprocessor.json",
    "encoder-decoder": "tokenizer.json",
}


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its folder and its manifest."""

    path: Path
    manifest: Manifest
    _opens: dict[str, frozenset[str]] = field(default_factory=dict, repr=False, compare=False)

    def has(self, name: str) -> bool:
        """Whether the manifest lists this file; files beside the list do not exist for the runtime."""
        return name in self.manifest.files

    def file(self, name: str) -> Path:
        """The path of a listed file; BundleError if it is not listed."""
        if not self.has(name):
            raise damaged(f"{name} is not listed in the manifest")
        return safe_member(self.path, name)

    @property
    def weight_bytes(self) -> int:
        """Size on disk of the graphs that a session on the CPU opens here, and of their weights."""
        graphs = graphs_here(self.manifest).values()
        opened = {*graphs, *(file for name in graphs for file in self.opened_by(name))}
        return sum(self.manifest.files[name].size for name in opened)

    def graph(self, name: str) -> Path:
        """The path of a graph by the name of its file; BundleError if it would open a file that is not
        listed."""
        path = self.file(name)
        if name not in self._opens:
            self._opens[name] = _opened_by(path, name, self.manifest)
        return path

    def opened_by(self, name: str) -> frozenset[str]:
        """The listed files that a graph takes its weights from."""
        self.graph(name)
        return self._opens[name]

    def text(self, name: str) -> str:
        """The UTF-8 text of a listed file."""
        try:
            return _read_small(self.file(name), _MAX_TEXT_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(f"{name} is not UTF-8 text") from error

    def json(self, name: str) -> Any:
        """The JSON document in a listed file."""
        try:
            return json.loads(self.text(name))
        except (ValueError, RecursionError) as error:
            raise damaged(f"{name} is not valid JSON") from error


def read_bundle(path: str | Path, verify: bool = True) -> Bundle:
    """Read and check a bundle folder; every problem is a BundleError.

    ``verify=False`` skips only the hashing of the files; paths, sizes and the manifest's digest are still
    checked.
    """
    bundle = _read(path, lambda name: verify)
    manifest = bundle.manifest
    _check_runtime(manifest.requires_onnxruntime)
    for graphs in (
        manifest.graphs,
        manifest.half_graphs,
        manifest.fused_graphs,
        *manifest.packed_graphs.values(),
    ):
        for name in graphs.values():
            bundle.graph(name)
    return bundle


def _read(path: str | Path, hashed: Callable[[str], bool]) -> Bundle:
    """``hashed`` says of a file whether its hash is compared."""
    root = Path(path)
    try:
        is_folder = root.is_dir()
    except (OSError, ValueError):
        is_folder = False
    if not is_folder:
        raise BundleError(
            f"There is no bundle folder at {str(path)!r}.",
            "Give the folder that `gemini-edge compress MODEL --output DIR` wrote.",
        )
    manifest = parse_manifest(_read_small(_regular(root, MANIFEST_NAME), MAX_MANIFEST_BYTES))
    if MANIFEST_NAME in manifest.files:
        raise damaged("the manifest lists itself")
    companion = _COMPANIONS[manifest.family]
    if companion not in manifest.files:
        raise damaged(f"{companion} is not listed in the manifest")
    for name, entry in manifest.files.items():
        file = _regular(root, name)
        if _size(file, name) != entry.size:
            raise damaged(f"{name} has {_size(file, name)} bytes instead of {entry.size}")
    _check_digests(root, manifest, filter(hashed, manifest.files))
    return Bundle(root, manifest)


@contextmanager
def hashed_meanwhile(path: str | Path, verify: bool = True, device: str = "auto") -> Iterator[Bundle]:
    """A bundle to load while the weights of the graphs that ``device`` may want are hashed in another thread;
    all files but weights are hashed before.

    To whoever loads them weights are numbers, whatever they are. When the block ends all files that may have
    been opened are known to be whole: BundleError if one is not, in place of any other error of the block.
    """
    bundle = _read(path, lambda name: verify and not name.endswith(_WEIGHTS))
    manifest = bundle.manifest
    wanted = [*graphs_here(manifest).values()]
    if device != "cpu" and manifest.half_graphs:  # and the portable ones, where the GPU refuses these
        wanted += [*manifest.half_graphs.values(), *manifest.graphs.values()]
    weights = sorted({file for name in wanted for file in bundle.opened_by(name)} if verify else ())
    with Background(lambda: _check_digests(bundle.path, bundle.manifest, weights)) as hashing:
        try:
            _check_runtime(bundle.manifest.requires_onnxruntime)
            yield bundle
        finally:
            hashing.result()


def _opened_by(path: Path, name: str, manifest: Manifest) -> frozenset[str]:
    try:
        return check_external_data(path, name, frozenset(manifest.files))
    except OSError as error:
        raise damaged(f"{name} cannot be read ({error.strerror})") from error


def _check_digests(root: Path, manifest: Manifest, names: Iterable[str]) -> None:
    for name in names:
        if file_digest(root / name) != manifest.files[name].sha256:
            raise damaged(f"{name} does not match its sha256")


def safe_member(root: str | Path, name: str) -> Path:
    """The path of ``name`` below ``root``; BundleError for absolute paths, ``..``, links out of it."""
    parts = name.split("/")
    windows = PureWindowsPath(name)
    if (
        not name
        or PurePosixPath(name).is_absolute()
        or windows.drive
        or windows.root
        or "\\" in name
        or "\0" in name
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise damaged(f"the path {name[:80]!r} is not a plain path inside the bundle")
    try:
        member = Path(root, *parts)
        if not member.resolve().is_relative_to(Path(root).resolve()):
            raise damaged(f"{name!r} is a link that leaves the bundle")
    except (OSError, RuntimeError, ValueError) as error:
        raise damaged(f"the path {name[:80]!r} cannot be followed") from error
    return member


def file_digest(path: str | Path) -> str:
    """The sha256 of a file as 64 hexadecimal digits, read in pieces; BundleError if it cannot be read."""
    import hashlib

    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            # After a piece the interpreter's lock is waited for, 5 ms if somebody else works: few pieces.
            piece = memoryview(bytearray(min(_PIECE, os.fstat(file.fileno()).st_size) or 1))
            while size := file.readinto(piece):
                digest.update(piece[:size])
            return digest.hexdigest()
    except OSError as error:
        raise damaged(f"{Path(path).name} cannot be read ({error.strerror})") from error


def _regular(root: Path, name: str) -> Path:
    """A member that exists and is a regular file: opening a pipe would block, a device would never end."""
    member = safe_member(root, name)
    try:
        mode = member.stat().st_mode
    except OSError as error:
        raise damaged(f"{name} is missing or unreadable ({error.strerror})") from error
    if not stat.S_ISREG(mode):
        raise damaged(f"{name} is not a regular file")
    return member


def _size(file: Path, name: str) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise damaged(f"{name} is missing or unreadable ({error.strerror})") from error


def _read_small(file: Path, limit: int) -> bytes:
    try:
        with open(file, "rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise damaged(f"{file.name} cannot be read ({error.strerror})") from error
    if len(data) > limit:
        raise damaged(f"{file.name} is larger than {limit} bytes")
    return data


def _check_runtime(required: str) -> None:
    from onnxruntime import __version__ as installed

    needed, present = (re.match(r"(\d{1,6})\.(\d{1,6})", text) for text in (required, installed))
    if needed is None:
        raise damaged(f"the required onnxruntime version {required[:40]!r} is not a version")
    if present is not None and tuple(map(int, present.groups())) < tuple(map(int, needed.groups())):
        raise BundleError(
            f"The bundle needs onnxruntime {required} or newer, installed is {installed}.",
            f"Run pip install 'onnxruntime>={required}'.",
        )
