"""The import rules, read from the source, and whether import-linter's contracts cover every folder."""

import ast
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"api", "model", "compress", "export", "runtime", "benchmarks"}
ON_A_DEVICE = {"numpy", "onnxruntime", "tokenizers", "gemini"}
IN_FUNCTIONS = {"PIL", "jinja2", "llguidance"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(top-level package, whether at module level) of every import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module_level = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        else:
            continue
        found += [(name.partition(".")[0], id(node) in module_level) for name in names]
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_runtime_imports_only_what_a_device_has() -> None:
    for path in sources("runtime"):
        for name, at_top in imports(path):
            allowed = name in ON_A_DEVICE or name in sys.stdlib_module_names
            assert allowed or (name in IN_FUNCTIONS and not at_top), f"{path.name} imports {name}"


@pytest.mark.parametrize("folder", sorted(FOLDERS | {"tests", "tools"}))
def test_no_file_imports_a_folder_by_its_bare_name(folder: str) -> None:
    for path in sources(folder):
        assert not {name for name, _ in imports(path)} & FOLDERS, path


def test_the_contracts_name_every_package_of_the_distribution() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name for name in settings["tool"]["setuptools"]["packages"] if name.count(".") == 1}
    layers = " ".join(settings["tool"]["importlinter"]["contracts"][0]["layers"])
    assert packages <= set(layers.replace("|", " ").split())


def test_every_folder_with_python_files_is_a_package_that_gets_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = set(settings["package-dir"].values())
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            assert str(init.parent.relative_to(ROOT)) in places, f"{init.parent} is missing in pyproject.toml"


def test_a_device_gets_the_versions_that_are_tested_here() -> None:
    tested, device = (pins(ROOT / name) for name in ("constraints.txt", "constraints-runtime.txt"))
    hub = device.pop("huggingface-hub")  # not called; `tokenizers` says which versions it takes
    assert device.items() <= tested.items()
    assert any(
        Requirement(line).name == "huggingface-hub" and hub in Requirement(line).specifier
        for line in requires("tokenizers") or []
    )
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {Requirement(line).name for line in needed} <= device.keys()


def pins(path: Path) -> dict[str, str]:
    """The version of each package that a constraints file names."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))
