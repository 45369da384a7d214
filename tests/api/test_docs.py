"""docs/cli.md is what the parsers say."""

from pathlib import Path

import pytest

from gemini.cli import VERBS, docs


def test_the_page_is_up_to_date() -> None:
    assert docs.main(["--check"]) == 0, "run `make docs`"


def test_the_page_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    before = docs.page()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert docs.page() == before
    assert all(f"\n## {verb}\n" in before for verb in VERBS)


def test_a_stale_page_fails_the_check(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(docs, "PAGE", tmp_path / "cli.md")
    assert docs.main(["--check"]) == 2
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    docs.PAGE.write_text(docs.PAGE.read_text().replace("--recipe", "--receipt"))
    assert docs.main(["--check"]) == 2
    assert "Run `make docs`" in capsys.readouterr().err
