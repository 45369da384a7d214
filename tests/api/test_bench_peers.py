"""`gemini-edge bench --peers`: our own adapter on a toy bundle, another one in its place as a peer."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from gemini.benchmarks.accuracy import score_generator
from gemini.benchmarks.peers.process import ADAPTERS
from gemini.benchmarks.text import default_text, token_windows
from gemini.cli import main
from gemini.runtime import load

COUNTS = ["--prompt-tokens", "4", "--new-tokens", "3", "--repeat", "1", "--threads", "1"]


@pytest.fixture
def peers_file(toys: dict[str, Path], tmp_path: Path) -> Path:
    """A peer whose interpreter runs our adapter on another bundle whatever it is asked to run."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ADAPTERS / "peer_gemini.py"}" "$2"\n')
    python.chmod(0o755)
    file = tmp_path / "peers.toml"
    file.write_text(
        f'[[peer]]\nname = "other"\nadapter = "llama.cpp"\npython = "./python"\nmodel = "{toys["concat"]}"\n'
        '[[peer]]\nname = "none"\nadapter = "transformers"\npython = "./nowhere"\nmodel = "python"\n'
    )
    return file


def test_a_bundle_beside_peers(toys: dict[str, Path], peers_file: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "results"
    arguments = ["bench", str(toys["shared"]), "--peers", str(peers_file), *COUNTS, "--windows", "2"]
    assert main([*arguments, "--output", str(output), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    ours, other, none = result["peers"]
    assert none["error"].endswith("nowhere cannot be started (No such file or directory)")
    assert (ours["error"], other["error"]) == (None, None)
    assert ours["versions"]["onnxruntime"]
    assert ours["latency"]["peak_rss_mb"] > 20
    assert ours["start_to_first_token_ms"]["p50"] > ours["latency"]["first_token_ms"]["p50"]
    for row, name in ((ours, "shared"), (other, "concat")):
        session = load(toys[name], threads=1)
        ids = session.tokenizer.encode(default_text().evaluation, special_tokens=False)
        windows = token_windows(ids, min(512, session.model.context_length), 2)
        expected = score_generator(session.logits, windows).perplexity
        # The same logits; ours are summed in float64, the judge's in float32.
        assert row["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert math.isfinite(row["perplexity"])
    assert "none: not measured" in captured.err
    assert (output / "peers.md").read_text().startswith("| runtime |")


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        (["--device", "tpu"], "device 'tpu' is unknown"),
        (["--windows", "-1"], "number of windows is -1"),
        (["--timeout", "nan"], "is nan"),
        (["--repeat", "0"], "number of rounds is 0"),
        (["--prompt-tokens", "100000"], "exceed the context"),
        (["--output", "{file}"], "is not a folder"),
        (["--text", "{none}"], "There is no text file"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(
    toys: dict[str, Path], peers_file: Path, tmp_path: Path, changes: list[str], cause: str, capsys
) -> None:
    places = {"{file}": str(peers_file), "{none}": str(tmp_path / "none.txt")}
    arguments = [places.get(value, value) for value in changes]
    assert main(["bench", str(toys["shared"]), "--peers", str(peers_file), *COUNTS, *arguments]) == 2
    assert cause in capsys.readouterr().err


def test_an_encoder_has_no_peers(toys: dict[str, Path], peers_file: Path, capsys) -> None:
    assert main(["bench", str(toys["embedder"]), "--peers", str(peers_file)]) == 2
    assert "is no decoder but for feature-extraction" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--sweep", "batch"], ["--windows", "2"], ["--output", "x"]])
def test_options_of_the_comparison_need_it(toys: dict[str, Path], option: list[str], capsys) -> None:
    assert main(["bench", str(toys["shared"]), *option]) == 2
    assert f"{option[0]} needs --peers" in capsys.readouterr().err


def test_nothing_measured_is_an_error(toys: dict[str, Path], peers_file: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("gemini.benchmarks.peers.field.sys.executable", "/nowhere/python")
    peers_file.write_text(peers_file.read_text().replace("./python", "./gone"))
    assert main(["bench", str(toys["shared"]), "--peers", str(peers_file), *COUNTS]) == 2
    assert "/nowhere/python cannot be started" in capsys.readouterr().err


def test_the_help_prints_the_guide_with_the_adapters_place(capsys) -> None:
    assert main(["bench", "--peers", "help"]) == 0
    printed = capsys.readouterr().out
    assert f"{ADAPTERS}/quantize_gguf.py" in printed
    assert "$ADAPTERS" not in printed


def test_random_prompts_reach_the_model_unchanged(toys: dict[str, Path], tmp_path: Path) -> None:
    """The adapter's greedy tokens are the runtime's own."""
    from gemini.benchmarks.peers.ask import random_batch
    from gemini.benchmarks.peers.compare import pinned_cpus
    from gemini.benchmarks.peers.field import bundle_peers
    from gemini.benchmarks.peers.process import PeerProcess

    session = load(toys["shared"], threads=1)
    (peer,) = bundle_peers([toys["shared"]])
    batch = random_batch(session.model.vocab_size, 3, 5, 0)
    with PeerProcess(peer.command, 1, pinned_cpus(1), own_path=True) as process:
        process.ask({"do": "load", "model": str(peer.model), "threads": 1, "device": "cpu"}, 60)
        answer = process.ask({"do": "run", "prompts": batch, "new_tokens": 4}, 60)
    expected = np.array(batch)
    for _ in range(5):
        token = session.logits(expected)[:, -1].argmax(-1)
        expected = np.concatenate([expected, token[:, None]], 1)
    assert answer["ids"] == expected[:, 5:].tolist()
