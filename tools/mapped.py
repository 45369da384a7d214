"""Run a tool where `gemini` is an ordinary folder tree.

    python tools/mapped.py mypy -p gemini
    python tools/mapped.py lint-imports

pyproject.toml maps the root folders to packages below ``gemini``; an editable install resolves that with an
import hook, which mypy and import-linter cannot follow. They get a throw-away tree of links instead:
``.types/gemini`` links the entries of api/, ``.types/gemini/runtime`` links runtime/ and so on.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".types"


def build_tree(root: Path, tree: Path) -> None:
    """Rebuild `tree` from ``[tool.setuptools.package-dir]`` of `root`'s pyproject.toml."""
    mapping = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(tree, ignore_errors=True)
    # Parents first: `gemini` becomes a real folder, so that the other packages can be linked into it.
    for package in sorted(mapping, key=lambda name: name.count(".")):
        target = tree.joinpath(*package.split("."))
        if target.exists():  # gemini.cli came along with its parent's entries
            continue
        if "." in package:
            target.symlink_to(root / mapping[package], target_is_directory=True)
            continue
        target.mkdir(parents=True)
        for entry in (root / mapping[package]).iterdir():
            if entry.name != "__pycache__":
                (target / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())


def main(command: list[str]) -> int:
    if not command:
        print("usage: python tools/mapped.py COMMAND [ARGUMENT...]", file=sys.stderr)
        return 2
    build_tree(ROOT, TREE)
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    environment = os.environ | {"MYPYPATH": str(TREE), "PYTHONPATH": str(TREE), "PATH": places}
    program = shutil.which(command[0], path=places)
    if program is None:
        print(f"error: {command[0]} is not installed. Run `make setup`.", file=sys.stderr)
        return 2
    return subprocess.run([program, *command[1:]], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
