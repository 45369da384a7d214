"""The guide's table: figures against hand-made results, pages that are stale, results of another kind."""

import json

import pytest

from gemini.benchmarks.guide import main, measured_rows
from gemini.errors import UsageError

EVAL = {
    "text": "books/emma.txt",
    "table": [
        {"name": "b/fp32", "size_mb": 540.0, "perplexity": 40.0, "kl": 0.0},
        {"name": "b/int8", "size_mb": 147.65, "perplexity": 40.2, "kl": 0.00341},
        {"name": "c/int4", "size_mb": 93.6, "perplexity": 43.0, "kl": 0.1},
    ],
}
BENCH = {
    "bundles": [
        {
            "path": "c/int4",
            "latency": {
                "kind": "generator",
                "decode_tokens_per_second": 80.4,
                "prefill_tokens_per_second": 440.0,
            },
        }
    ]
}
TABLE = """| bundle | MB | perplexity, emma | divergence, emma | decode tokens/s | prefill tokens/s |
| --- | ---: | ---: | ---: | ---: | ---: |
| fp32 | 540.0 | 40.00 | 0.0000 | – | – |
| int8 | 147.7 | +0.5 % | 0.0034 | – | – |
| int4 | 93.6 | +7.5 % | 0.1000 | 80 | 440 |"""


def test_a_row_holds_what_was_measured_of_a_bundle() -> None:
    head, _, row, other = measured_rows([EVAL, BENCH])
    assert head[1:4] == ["MB", "perplexity, emma", "divergence, emma"]
    assert row == ["int8", "147.7", "+0.5 %", "0.0034", "–", "–"]
    assert other == ["int4", "93.6", "+7.5 %", "0.1000", "80", "440"]


def test_bundles_measured_apart_share_their_columns() -> None:
    reference, first, second = EVAL["table"]
    parts = [{**EVAL, "table": [reference, row]} for row in (first, second)]
    assert measured_rows([*parts, BENCH]) == measured_rows([EVAL, BENCH])


def test_the_page_gets_the_table_and_check_finds_a_stale_one(tmp_path, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- measured:begin -->\nold\n<!-- measured:end -->\nbelow\n")
    files = []
    for name, result in (("eval", EVAL), ("bench", BENCH)):
        files.append(tmp_path / name)
        files[-1].write_text("a table for people\n" + json.dumps(result) + "\n")
    arguments = [str(page), *map(str, files)]
    assert main([*arguments, "--check"]) == 2
    assert "stale" in capsys.readouterr().err and "old" in page.read_text()
    assert main(arguments) == 0
    assert page.read_text() == f"above\n<!-- measured:begin -->\n\n{TABLE}\n\n<!-- measured:end -->\nbelow\n"
    assert main([*arguments, "--check"]) == 0


@pytest.mark.parametrize(
    "result",
    [
        {"rows": []},
        {"text": "built-in", "table": [EVAL["table"][0]]},
        {"text": "built-in", "table": [{"name": "a", "size_mb": 1.0}, {"name": "b", "size_mb": 1.0}]},
        {"bundles": [{"path": "a", "latency": {"kind": "batches"}}]},
    ],
)
def test_other_results_are_refused(result) -> None:
    with pytest.raises(UsageError):
        measured_rows([result])


def test_a_file_without_json_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "page.md").write_text("")
    (tmp_path / "text").write_text("no json")
    assert main([str(tmp_path / "page.md"), str(tmp_path / "text")]) == 2
    assert "no result of --json" in capsys.readouterr().err
