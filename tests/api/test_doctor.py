"""`doctor` on invented installations."""

import json
import subprocess
import sys

import pytest

from gemini.cli import doctor, main

REQUIREMENTS = [
    "numpy>=2.0",
    "onnxruntime>=1.31",
    'torch>=2.13; extra == "compress"',
    "transformers<6,>=5.0; extra == 'compress'",
    'pillow>=11 ; extra == "vision"',
    'gemini-edge[compress,vision]; extra == "dev"',
    'ruff==0.17.6; extra == "dev"',
]
COMPLETE = {
    "numpy": "2.4.6",
    "onnxruntime": "1.31.1",
    "torch": "2.13.0+cpu",
    "transformers": "5.23.0",
    "pillow": "13.0.0",
    "ruff": "0.17.6",
}


def test_a_complete_installation_lacks_nothing() -> None:
    assert doctor.missing_by_extra(REQUIREMENTS, COMPLETE) == {
        "": [],
        "compress": [],
        "vision": [],
        "dev": [],
    }


def test_the_wheel_for_gpus_is_an_onnxruntime_too() -> None:
    installed = {name: version for name, version in COMPLETE.items() if name != "onnxruntime"}
    assert doctor.missing_by_extra(REQUIREMENTS, installed | {"onnxruntime-gpu": "1.31.1"})[""] == []
    assert doctor.missing_by_extra(REQUIREMENTS, installed)[""] == ["onnxruntime>=1.31"]


def test_what_is_missing_or_too_old_is_listed_under_its_extra() -> None:
    installed = COMPLETE | {"onnxruntime": "1.9.2", "transformers": "6.0"}
    del installed["pillow"]
    missing = doctor.missing_by_extra(REQUIREMENTS, installed)
    assert missing[""] == ["onnxruntime>=1.31 (installed: 1.9.2)"]
    assert missing["compress"] == ["transformers<6,>=5.0 (installed: 6.0)"]
    assert missing["vision"] == ["pillow>=11"]


@pytest.mark.parametrize(
    ("version", "bounds", "kept"),
    [
        ("1.31.1", ">=1.31", True),
        ("1.9", ">=1.31", False),
        ("2.13.0+cpu", ">=2.13", True),
        ("5.0.0rc1", ">=5.0,<6", True),
        ("6.0.0", ">=5.0,<6", False),
        ("0.17.6", "==0.17.6", True),
        ("0.17.7", "==0.17.6", False),
        ("9", "", True),
    ],
)
def test_versions_are_compared_as_numbers_not_as_text(version: str, bounds: str, kept: bool) -> None:
    assert doctor.within(version, bounds) is kept


def test_two_onnxruntime_wheels_clash() -> None:
    assert doctor.clashes({"onnxruntime": "1", "numpy": "2"}) == []
    assert doctor.clashes({"onnxruntime-gpu": "1"}) == []
    found = doctor.clashes({"onnxruntime-gpu": "1", "onnxruntime": "1"})
    assert found == ["onnxruntime", "onnxruntime-gpu"]
    facts = {"clashes": found, "missing": {}, "telemetry": "off"}
    (line,) = doctor.problems(facts)
    assert "pip uninstall onnxruntime onnxruntime-gpu" in line


def test_names_are_compared_as_indexes_do() -> None:
    assert doctor.normalised("Onnx_IR") == doctor.normalised("onnx.ir") == "onnx-ir"


def test_the_findings_of_this_machine_are_complete_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["telemetry"] == "off"
    assert facts["threads"]["usable"] >= 1
    assert "CPUExecutionProvider" in facts["providers"]
    assert facts["host"]["packages"]["onnxruntime"]
    assert {"", "chat", "compress", "report", "dev"} <= set(facts["missing"])


def test_two_wheels_are_reported_as_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = doctor.installed_versions() | {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(doctor, "installed_versions", lambda: installed)
    assert main(["doctor"]) == 0
    assert "problem: onnxruntime and onnxruntime-gpu overwrite each other." in capsys.readouterr().out


def test_a_broken_onnxruntime_is_a_finding_not_a_crash() -> None:
    code = (
        "import sys\n"
        "sys.modules['onnxruntime'] = None  # what an import of a half-removed package amounts to\n"
        "from gemini.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "problem: onnxruntime cannot be used" in done.stdout
