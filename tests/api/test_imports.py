"""The import rules, read from the source, and whether import-linter's contracts cover every folder."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

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
