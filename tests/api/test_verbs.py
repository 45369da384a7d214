"""The verbs on toy bundles: what they print, what they return, what they refuse."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemini.cli import main
from gemini.errors import GateError
from gemini.pretrained import shipped_bundle
from gemini.runtime import kernels


def result_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result: dict[str, Any] = json.loads(out)
    return result


def test_run_streams_the_text_that_json_reports(toys: dict[str, Path], capsys) -> None:
    arguments = ["run", str(toys["shared"]), "--prompt", "the sea", "--max-new-tokens", "12"]
    generation = result_of(capsys, *arguments)["generation"]
    assert generation["prompt_tokens"] > 0
    assert main(arguments) == 0
    assert capsys.readouterr().out == generation["text"] + "\n"


def test_run_repeats_itself_with_a_seed(toys: dict[str, Path], capsys) -> None:
    arguments = ["run", str(toys["concat"]), "--prompt", "one", "--max-new-tokens", "8", "--temperature=2"]
    texts = {result_of(capsys, *arguments, "--seed", "7")["generation"]["text"] for _ in range(2)}
    assert len(texts) == 1


@pytest.mark.parametrize("draft", ["lookup", "shared"])
def test_run_speculates_without_changing_the_text(toys: dict[str, Path], capsys, draft: str) -> None:
    plain = ["run", str(toys["shared"]), "--prompt", "one two one two one two", "--max-new-tokens", "30"]
    assert main(plain) == 0
    text = capsys.readouterr().out
    speculating = [*plain, "--speculate", str(toys.get(draft, draft))]
    assert main(speculating) == 0
    assert capsys.readouterr().out == text
    assert main([*speculating, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["generation"]
    assert found["text"] + "\n" == text
    counts = found["speculation"]
    assert counts["calls"] + counts["accepted"] + 1 == len(found["tokens"])
    assert 0 <= counts["accepted"] <= counts["drafted"]


def test_run_refuses_drafts_for_and_by_what_generates_no_text(toys: dict[str, Path], capsys) -> None:
    assert main(["run", str(toys["embedder"]), "--text", "a", "--speculate", "lookup"]) == 2
    assert "not drafted for" in capsys.readouterr().err
    assert main(["run", str(toys["shared"]), "--prompt", "a", "--speculate", str(toys["embedder"])]) == 2
    assert "feature-extraction" in capsys.readouterr().err


def test_run_reads_standard_input_and_imports_neither_torch_nor_onnx(toys: dict[str, Path]) -> None:
    code = (
        "import sys\nfrom gemini.cli import main\n"
        f"code = main(['run', {str(toys['shared'])!r}, '-', '--max-new-tokens', '4', '--json'])\n"
        "heavy = {'torch', 'transformers', 'onnx', 'optimum', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, input="the wind is cold", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "[]\n"
    assert json.loads(done.stdout.splitlines()[-1])["prompt"] == "the wind is cold"


def test_run_writes_what_a_schema_or_an_expression_accepts(toys: dict[str, Path], tmp_path, capsys) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}')
    arguments = ["run", str(toys["shared"]), "--prompt", "the sea"]
    generation = result_of(capsys, *arguments, "--json-schema", str(schema))["generation"]
    answer = json.loads(generation["text"])
    assert len(answer) == 2 and all(isinstance(item, bool) for item in answer)
    assert main([*arguments, "--regex", "[a-d]{3}"]) == 0
    assert re.fullmatch("[a-d]{3}\n", capsys.readouterr().out)
    for wrong, message in (
        (["--json-schema", str(tmp_path / "none.json")], "cannot be read as a text"),
        (["--regex", "("], "unclosed group"),
        (["--regex", "a", "--json-schema", str(schema)], "Give one of them"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_run_embeds_one_line_of_numbers_a_text(toys: dict[str, Path], capsys) -> None:
    arguments = ["run", str(toys["embedder"]), "--text", "the sea", "a stone"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = np.array([[float(number) for number in line.split()] for line in lines])
    expected = np.array(result_of(capsys, *arguments)["embeddings"])
    np.testing.assert_allclose(printed, expected, rtol=1e-5)  # six digits are printed


def test_run_classifies_texts_and_images(toys: dict[str, Path], capsys, tmp_path: Path) -> None:
    from PIL import Image

    (labels,) = result_of(capsys, "run", str(toys["classifier"]), "--text", "one two")["labels"]
    assert sorted(label["label"] for label in labels) == ["bad", "fine", "good"]
    assert labels[0]["score"] >= labels[-1]["score"]
    Image.new("RGB", (20, 10), (200, 30, 40)).save(tmp_path / "red.png")
    result = result_of(capsys, "run", str(toys["vision"]), "--image", str(tmp_path / "red.png"))
    assert result["task"] == "image-classification"
    assert len(result["labels"][0]) == 4


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("shared", ["--text", "a"]),
        ("shared", ["--image", "a.png"]),
        ("embedder", ["--prompt", "a"]),
        ("classifier", ["--image", "a.png"]),
        ("vision", ["--text", "a"]),
        ("vision", ["--image", "/no/such.png"]),
        ("shared", ["--prompt", "a", "--threads", "0"]),
        ("shared", ["--prompt", "a", "--device", "abacus"]),
        ("shared", ["--prompt", "a", "--top-p", "2"]),
        ("shared", ["--prompt", "word " * 400]),
    ],
)
def test_run_refuses_what_does_not_fit_the_bundle(
    kind: str, arguments: list[str], toys: dict[str, Path], capsys
) -> None:
    assert main(["run", str(toys[kind]), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_inspect_shows_every_section_and_the_table(toys: dict[str, Path], capsys) -> None:
    assert main(["inspect", str(toys["reported"])]) == 0
    out = capsys.readouterr().out
    for words in (
        "com.microsoft::GroupQueryAttention",
        "decoder.onnx",
        "skip_norm",
        "2.0 MB",
        "int4",
        "convolutions stay fp32",
        "torch",
        "91.2",
        "22.50",
        "report.html",
    ):
        assert words in out
    assert main(["inspect", str(toys["reported"]), "--report"]) == 0
    only = capsys.readouterr().out
    assert "GroupQueryAttention" not in only
    assert "22.50" in only


def test_inspect_returns_the_manifest(toys: dict[str, Path], capsys) -> None:
    result = result_of(capsys, "inspect", str(toys["reported"]))
    assert result["manifest"] == json.loads((toys["reported"] / "manifest.json").read_text())
    assert [row["name"] for row in result["table"]] == ["fp32", "bundle"]


def test_verify_passes_a_sound_bundle_and_names_the_damage_of_another(
    toys: dict[str, Path], capsys, tmp_path: Path
) -> None:
    assert result_of(capsys, "verify", str(toys["embedder"]))["sound"] is True
    for file in toys["embedder"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "encoder.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "encoder.onnx").write_bytes(data)
    for verb in ("verify", "inspect"):
        assert main([verb, str(tmp_path)]) == 2
        assert "encoder.onnx" in capsys.readouterr().err


def test_prepack_adds_to_a_bundle_what_inspect_shows(capsys, tmp_path: Path) -> None:
    if not kernels.available():
        pytest.skip("the kernels are not built or do not fit here")
    folder = str(shutil.copytree(shipped_bundle("gemini-nano"), tmp_path / "nano"))
    result = result_of(capsys, "prepack", folder, "--layout", "avx2")
    assert {"decoder.avx2.onnx", "encoder.avx2.onnx"} < set(result["files"])
    assert result["bytes"] == sum((Path(folder) / name).stat().st_size for name in result["files"])
    assert main(["inspect", folder]) == 0
    assert "decoder.avx2.onnx" in capsys.readouterr().out
    assert result_of(capsys, "verify", folder)["digest"] == result["digest"]


def test_prepack_refuses_a_bundle_that_has_nothing_to_pack(toys: dict[str, Path], capsys) -> None:
    assert main(["prepack", str(toys["shared"])]) == 2
    assert "pack" in capsys.readouterr().err


def test_bench_compares_two_bundles_in_one_run(toys: dict[str, Path], capsys) -> None:
    paths = [str(toys["shared"]), str(toys["concat"])]
    counts = ["--prompt-tokens", "8", "--new-tokens", "4", "--repeat", "1", "--threads", "1"]
    result = result_of(capsys, "bench", *paths, *counts)
    assert [bundle["path"] for bundle in result["bundles"]] == paths
    assert main(["bench", *paths, *counts]) == 0
    out = capsys.readouterr().out
    assert "decode tok/s" in out
    assert out.count(" x\n") == 2


def test_bench_times_an_embedder(toys: dict[str, Path], capsys) -> None:
    assert main(["bench", str(toys["embedder"]), "--prompt-tokens", "8", "--repeat", "1"]) == 0
    assert "items/s" in capsys.readouterr().out


def test_eval_of_a_generator_against_itself_finds_no_difference(
    toys: dict[str, Path], capsys, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the sea is grey and the wind is cold. " * 40)
    bundle = str(toys["shared"])
    arguments = ["eval", bundle, "--text", str(text), "--window", "32", "--windows", "3"]
    (alone,) = result_of(capsys, *arguments)["table"]
    assert alone["perplexity"] > 1
    reference, row = result_of(capsys, *arguments, "--reference", bundle)["table"]
    assert row["perplexity"] == pytest.approx(alone["perplexity"])
    assert row["top1_agreement"] == 1.0
    assert row["kl"] == pytest.approx(0.0, abs=1e-5)  # the reference's logits are kept as float16
    assert reference["name"] == bundle
    both = result_of(capsys, "eval", bundle, *arguments[1:], "--reference", bundle)["table"]
    assert both == [reference, row, row]


def test_eval_of_an_embedder_and_a_classifier_needs_a_reference(toys: dict[str, Path], capsys) -> None:
    for kind, metric in (("embedder", "cosine_min"), ("classifier", "agreement")):
        bundle = str(toys[kind])
        assert main(["eval", bundle, "--sentences", "5"]) == 2
        assert "--reference" in capsys.readouterr().err
        table = result_of(capsys, "eval", bundle, "--sentences", "5", "--reference", bundle)["table"]
        assert table[1][metric] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no text file"), (b"", "empty"), (b"\xff\xfe\x00", "not UTF-8"), (b"a\x00b", "binary")],
)
def test_eval_refuses_unusable_text_files(
    content: bytes | None, words: str, toys: dict[str, Path], capsys, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    assert main(["eval", str(toys["shared"]), "--text", str(tmp_path / "text")]) == 2
    assert words in capsys.readouterr().err


def test_eval_refuses_to_compare_different_tasks(toys: dict[str, Path], capsys) -> None:
    assert main(["eval", str(toys["shared"]), "--reference", str(toys["embedder"])]) == 2
    assert "tasks differ" in capsys.readouterr().err


def test_compress_passes_its_options_on_and_prints_the_table(monkeypatch, capsys, tmp_path: Path) -> None:
    calls: list[tuple[Any, Any]] = []

    def compress_model(*positional: Any, **options: Any) -> dict[str, Any]:
        calls.append((positional, options))
        table = [{"name": "fp32", "size_mb": 4.0, "perplexity": 2.0}]
        blocks = {"name": "4-bit blocks of 32"}
        tuning = {"portable": blocks, "chosen": blocks, "candidates": [{**blocks, "ms_per_token": 2.5}]}
        memory = {"limit_mb": 2000, "needed_mb": 4400, "weights_on_disk": options["memory"] is not None}
        tuned = tuning if options["tune"] else None
        return {"table": table, "plan": None, "recovery": None, "tuning": tuned, "memory": memory}

    install_pipeline(monkeypatch, compress_model)
    output = str(tmp_path / "out")
    arguments = ["compress", "model", "--output", output, "--recipe", "int4", "--max-drop", "5", "--force"]
    assert main([*arguments, "--tune", "--memory", "2"]) == 0
    out = capsys.readouterr().out
    assert "Perplexity" in out
    assert "report.html" in out
    ((positional, options),) = calls
    assert positional == ("model", output, "int4")
    assert options["tune"] is True
    assert options["memory"] == 2.0
    assert options["max_drop"] == 5.0
    assert options["force"] is True
    assert "4-bit blocks of 32 stay, 2.50 ms" in out
    assert "about 4.4 GB with all weights in memory, 2.0 may be held" in out
    assert result_of(capsys, *arguments)["table"][0]["name"] == "fp32"


@pytest.mark.parametrize(
    ("failure", "code"),
    [(GateError("It lost 30 %.", "Use int8."), 3), (OSError(errno.ENOSPC, "No space left on device"), 2)],
)
def test_compress_reports_a_failed_gate_and_a_full_disk(
    failure: Exception, code: int, monkeypatch, capsys
) -> None:
    def compress_model(*positional: Any, **options: Any) -> dict[str, Any]:
        raise failure

    install_pipeline(monkeypatch, compress_model)
    assert main(["compress", "model", "--output", "x", "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["exit_code"] == code
    assert err.count("\n") == 1


def install_pipeline(monkeypatch: pytest.MonkeyPatch, compress_model: Any) -> None:
    """A pipeline without torch: these tests are about the verb."""
    import types

    module = types.ModuleType("gemini.pipeline")
    module.compress_model = compress_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gemini.pipeline", module)
