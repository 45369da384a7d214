"""A comparison's table, the page that holds it, and its plots."""

import copy
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from gemini.benchmarks.latency import Ceiling, Run, summarize
from gemini.benchmarks.page import replace_section
from gemini.benchmarks.peers.__main__ import main
from gemini.benchmarks.peers.figures import draw_comparison
from gemini.benchmarks.peers.run import write_results
from gemini.benchmarks.peers.table import markdown_table, sweep_tables
from gemini.errors import UsageError

PAGE = "# Title\n\n<!-- peers:begin -->\n\nold\n\n<!-- peers:end -->\n\nend\n"


def measured(name: str, adapter: str, step: float, perplexity: float | None) -> dict:
    report = summarize([Run(0.1, (step,) * 4)] * 2, 16, 1, Ceiling(2**30, 200.0)).to_dict()
    speed = {"p50": 0.01 / step, "low": 0.01 / step, "high": 0.01 / step}
    return {
        "name": name,
        "adapter": adapter,
        "model": "m",
        "size_mb": 91.25,
        "error": None,
        "versions": {"lib": "1.0"},
        "latency": report | {"peak_rss_mb": 237.4},
        "start_to_first_token_ms": {"p50": 812.4},
        "perplexity": perplexity,
        "scored_tokens": 4088 if perplexity else 0,
        "ratio": {"decode": speed, "prefill": {"p50": 1.0}, "start": {"p50": 0.5}},
    }


@pytest.fixture
def result() -> dict:
    points = [
        {"batch": size, "prefill_tokens_per_second": 100.0, "decode_tokens_per_second": 10.0 * size}
        for size in (1, 2, 4)
    ]
    return {
        "schema_version": 1,
        "prompt_tokens": 16,
        "new_tokens": 4,
        "repeat": 2,
        "threads": 2,
        "read_gib_per_second": 200.0,
        "host": {"cpu": "A Processor", "commit": "abc"},
        "text": {"name": "emma.txt"},
        "peers": [
            measured("gemini-edge a", "gemini-edge", 0.01, 20.5),
            measured("peer $x$ | b", "llama.cpp", 0.02, 25.0),
            {"name": "lost", "adapter": "llama.cpp", "model": "m", "size_mb": 1.0, "error": "no <b>room</b>"},
        ],
        "sweeps": {
            "batch": [
                {"name": "gemini-edge a", "error": None, "points": points},
                {"name": "peer $x$ | b", "error": "no room", "points": points[:2]},
            ]
        },
    }


def test_the_table_says_what_was_measured_and_what_was_not(result: dict) -> None:
    assert markdown_table(result) == (
        "| runtime | size MB | perplexity | decode tokens/s | prefill tokens/s | start to first token ms | "
        "peak MB | of the bandwidth |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| gemini-edge a | 91.2 | 20.50 | 100.0 (1.00 ×) | 160 (1.00 ×) | 812 (0.50 ×) | 237 | 50 % |\n"
        "| peer $x$ \\| b | 91.2 | 25.00 | 50.0 (0.50 ×) | 160 (1.00 ×) | 812 (0.50 ×) | 237 | 25 % |\n"
        "\n"
        "- lost: not measured, no \\<b\\>room\\</b\\>\n"
        "\n"
        "A Processor, 2 threads, reading 200.0 GiB/s, commit abc. A prompt of 16 tokens and 4 more, greedy. "
        "Medians of 2 rounds, interleaved; in parentheses how many times as fast as the first row, round by "
        "round. Perplexity over 4,088 tokens of emma.txt. Versions: lib 1.0."
    )


def test_figures_that_are_missing_are_dashes(result: dict) -> None:
    row = result["peers"][0]
    row |= {"perplexity": None, "start_to_first_token_ms": None, "scored_tokens": 0}
    del row["ratio"]
    row["latency"]["bandwidth_percent"] = None
    assert "| gemini-edge a | 91.2 | – | 100.0 | 160 | – | 237 | – |" in markdown_table(result)


def test_sweeps_have_a_line_for_each_rate(result: dict) -> None:
    assert sweep_tables(result) == (
        "| tokens/s by batch | 1 | 2 | 4 |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| gemini-edge a, prefill | 100.0 | 100.0 | 100.0 |\n"
        "| gemini-edge a, decode | 10.0 | 20.0 | 40.0 |\n"
        "| peer $x$ \\| b, prefill | 100.0 | 100.0 | – |\n"
        "| peer $x$ \\| b, decode | 10.0 | 20.0 | – |\n"
        "\n"
        "- peer $x$ \\| b left: no room"
    )
    assert sweep_tables({**result, "sweeps": {}}) == ""


@pytest.mark.parametrize(
    "page",
    [
        "nothing",
        "<!-- peers:begin -->",
        "<!-- peers:end --> <!-- peers:begin -->",
        "<!-- peers:begin --> <!-- peers:end --> <!-- peers:end -->",
        "<!-- peers:begin --> <!-- peers:begin --> <!-- peers:end -->",
        "<!-- peers:end --> <!-- peers:begin --> <!-- peers:end -->",
    ],
)
def test_a_page_without_its_two_comments_is_refused(page: str) -> None:
    with pytest.raises(UsageError, match="once each, in this order"):
        replace_section(page, "peers", "table")


def test_the_page_gets_the_table_and_nothing_else_changes(result: dict, tmp_path: Path, capsys) -> None:
    page, file = tmp_path / "README.md", tmp_path / "peers.json"
    page.write_text(PAGE)
    file.write_text(json.dumps(result))
    arguments = [str(page), str(file)]
    assert main([*arguments, "--check"]) == 2
    assert "is stale" in capsys.readouterr().err
    assert page.read_text() == PAGE
    assert main(arguments) == 0
    begin, end = "# Title\n\n<!-- peers:begin -->\n\n", "\n\n<!-- peers:end -->\n\nend\n"
    assert page.read_text() == begin + markdown_table(result) + end
    assert main([*arguments, "--check"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "peers.json"]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{", "is no comparison"),
        ("[]", "is no comparison"),
        ('{"peers": [], "schema_version": 9}', "another release"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str, cause: str, capsys) -> None:
    page, file = tmp_path / "README.md", tmp_path / "peers.json"
    page.write_text(PAGE)
    file.write_text(content)
    assert main([str(page), str(file)]) == 2
    assert main([str(page), str(tmp_path / "none")]) == 2
    assert cause in capsys.readouterr().err
    assert page.read_text() == PAGE


def test_plots_are_drawn_for_what_is_there(result: dict) -> None:
    drawn = draw_comparison(result)
    assert set(drawn) == {"peers_frontier.png", "peers_bandwidth.png", "peers_batch.png"}
    for png in drawn.values():
        assert Image.open(io.BytesIO(png)).size[0] > 800
    moved = copy.deepcopy(result)
    moved["sweeps"]["batch"][0]["points"][2]["decode_tokens_per_second"] = 80.0
    changed = draw_comparison(moved)
    assert changed["peers_batch.png"] != drawn["peers_batch.png"]
    assert changed["peers_frontier.png"] == drawn["peers_frontier.png"]


def test_results_replace_older_ones_and_leave_nothing_else(result: dict, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "results"
    folder.mkdir(parents=True)
    (folder / "peers.json").write_text("older")
    write_results(result | {"repeat": 9}, folder)
    names = {"peers.json", "peers.md", "peers_frontier.png", "peers_bandwidth.png", "peers_batch.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "peers.json").read_text())["repeat"] == 9
    assert (folder / "peers.md").read_text().endswith("left: no room\n")
