"""`gemini-edge stories`: a corpus is continued where it ends, and nothing else is taken for one."""

import json
from pathlib import Path

import pytest

import gemini.runtime
from gemini.cli import main
from gemini.runtime import Generation, TextGenerator


class Teller(TextGenerator):
    """Answers each prompt with its own seed, in enough different words to be kept."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def render_chat(self, messages, add_generation_prompt=True):
        return messages[0]["content"]

    def generate(self, prompt, *, seed=0, **options):
        self.seeds.append(seed)
        words = [" ".join(f"w{seed + row}x{word}" for word in range(40)) + "." for row in range(len(prompt))]
        return [Generation(" " + text, tuple(range(50)), 3, "length") for text in words]


@pytest.fixture
def teller(monkeypatch) -> Teller:
    teller = Teller()
    monkeypatch.setattr(gemini.runtime, "load", lambda *_, **__: teller)
    return teller


def stories(capsys, output: Path, tokens: int) -> dict:
    assert (
        main(["stories", "bundle", "--output", str(output), f"--tokens={tokens}", "--batch=2", "--json"]) == 0
    )
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_corpus_is_continued_with_the_next_seed(teller, tmp_path, capsys):
    output = tmp_path / "stories.jsonl"
    assert stories(capsys, output, 150)["next_seed"] == 4  # two batches of two rows of 50 tokens
    whole = output.read_bytes()
    output.write_bytes(whole + b'{"seed": 4, "tok')  # a kill in the middle of a line
    result = stories(capsys, output, 300)
    assert (result["tokens"], result["stories"], result["next_seed"]) == (300, 6, 6)
    assert output.read_bytes().startswith(whole)
    assert teller.seeds == [0, 2, 4]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["seed"] for row in rows] == list(range(6))
    assert all(row["text"].endswith(f"w{row['seed']}x39.") for row in rows)


def test_a_complete_corpus_is_left_alone(teller, tmp_path, capsys):
    output = tmp_path / "stories.jsonl"
    stories(capsys, output, 100)
    before = output.read_bytes()
    stories(capsys, output, 100)
    assert output.read_bytes() == before and teller.seeds == [0]


def test_another_file_is_not_overwritten(teller, tmp_path, capsys):
    output = tmp_path / "notes.txt"
    output.write_text("buy milk\n")
    assert main(["stories", "bundle", "--output", str(output)]) == 2
    assert "no corpus of stories" in capsys.readouterr().err
    assert output.read_text() == "buy milk\n"


@pytest.mark.parametrize("option", ["--tokens=0", "--batch=0", "--seed=-1"])
def test_impossible_numbers_are_refused(option, teller, tmp_path):
    assert main(["stories", "bundle", "--output", str(tmp_path / "s.jsonl"), option]) == 2


def test_a_bundle_that_writes_no_text_is_refused(toys, tmp_path, capsys):
    output = tmp_path / "s.jsonl"
    assert main(["stories", str(toys["embedder"]), "--output", str(output)]) == 2
    assert "does not generate text" in capsys.readouterr().err and not output.exists()
