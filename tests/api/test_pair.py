"""Encoder-decoders through the verbs: a toy bundle for all that reads one, a tiny Gemini for `compress`."""

import json

import pytest

from gemini import pipeline
from gemini.cli import main
from gemini.model.gemini import caption_prompt
from gemini.runtime import Seq2SeqGenerator, load


def result_of(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_run_answers_texts_images_and_both(toys, picture, capsys):
    given = ["run", str(toys["pair"]), "--max-new-tokens", "5"]
    for source in (["--prompt", "one"], ["--image", picture], ["--prompt", "one", "--image", picture]):
        expected = result_of(capsys, *given, *source)["generation"]["text"]
        assert main([*given, *source]) == 0
        assert capsys.readouterr().out == expected + "\n"
    assert len(result_of(capsys, *given, "--image", picture, picture)["generations"]) == 2


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("pair", ["--text", "one"]),
        ("pair", ["--prompt", "one", "--chat"]),
        ("shared", ["--prompt", "one", "--image", "cat.png"]),
        ("shared", ["--image", "cat.png"]),
    ],
)
def test_run_refuses_what_the_bundle_does_not_read(kind, source, toys, capsys):
    assert main(["run", str(toys[kind]), *source]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_bench_eval_inspect_and_verify_know_the_pair(toys, capsys):
    bundle = str(toys["pair"])
    timed = result_of(capsys, "bench", bundle, "--prompt-tokens=8", "--new-tokens=4", "--repeat=1")
    assert timed["new_tokens"] == 4 and timed["bundles"][0]["latency"]["kind"] == "generator"
    (row,) = result_of(capsys, "eval", bundle, "--window=24", "--windows=2")["table"]
    assert row["tokens"] == 24 and row["perplexity"] > 1  # the second halves of two windows
    rows = result_of(capsys, "eval", bundle, "--window=24", "--windows=2", "--reference", bundle)["table"]
    assert rows[1]["top1_agreement"] == 1.0 and rows[1]["kl"] == pytest.approx(0, abs=1e-5)
    assert result_of(capsys, "inspect", bundle)["manifest"]["family"] == "encoder-decoder"
    assert result_of(capsys, "verify", bundle)["sound"]


def test_compress_measures_text_and_pictures(gemini_folder, picture, tmp_path):
    report = pipeline.compress_model(str(gemini_folder), tmp_path / "bundle", "int4", progress=False)
    assert [row["name"] for row in report["table"]] == ["fp32", "round-to-nearest", "bundle"]
    reference, _, bundle = report["table"]
    assert reference["image_agreement"] == reference["top1_agreement"] == 1.0
    assert bundle["perplexity"] == pytest.approx(reference["perplexity"], rel=0.05)  # random weights, 4 bits
    assert bundle["size_mb"] < reference["size_mb"]
    assert len(report["passes"][0]["folded"]) == 9 and report["passes"][0]["calibration_windows"] > 0
    session = load(tmp_path / "bundle")
    assert isinstance(session, Seq2SeqGenerator)
    asked = session.generate(caption_prompt("en"), picture, max_new_tokens=4)
    assert session.generate(image=picture, max_new_tokens=4) == asked
