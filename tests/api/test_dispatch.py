"""The dispatcher: laziness, JSON, exit codes, and one clear line for everything that goes wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import gemini.cli
from gemini import errors
from gemini.cli import VERBS, main

HEAVY = {"torch", "transformers", "onnx", "onnxscript", "optimum", "matplotlib"}


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[object], object]], None]:
    """Installs a verb `fake` whose main is the given function."""

    def install(body: Callable[[object], object]) -> None:
        module = types.ModuleType("gemini.cli.fake")
        module.HELP, module.EXAMPLE, module.main = "A verb of the tests.", "gemini-edge fake", body
        module.add_arguments = lambda parser: None
        monkeypatch.setitem(sys.modules, "gemini.cli.fake", module)
        monkeypatch.setattr(gemini.cli, "VERBS", ("fake",))

    return install


def raising(error: BaseException) -> Callable[[object], object]:
    def body(args: object) -> object:
        raise error

    return body


def gemini_edge(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gemini.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("name", VERBS)
def test_help_of_a_verb_imports_no_other_verb_and_nothing_heavy(name: str) -> None:
    code = (
        "import sys\nfrom gemini.cli import main\n"
        f"assert main([{name!r}, '--help']) == 0\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(done.stderr.split())
    assert not loaded & (HEAVY | {"numpy", "onnxruntime"})
    assert {f"gemini.cli.{other}" for other in VERBS} & loaded == {f"gemini.cli.{name}"}
    assert "exit codes: 0 done" in " ".join(done.stdout.split())


def test_json_is_the_last_line_of_stdout_and_prose_moves_to_stderr(verb, capsys) -> None:
    def body(args: object) -> object:
        print("for people")
        return {"path": Path("x"), "infinite": float("inf"), "nested": [1, None, True]}

    verb(body)
    assert main(["fake", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert json.loads(out) == {"path": "x", "infinite": None, "nested": [1, None, True]}
    assert err == "for people\n"
    assert main(["fake"]) == 0
    assert capsys.readouterr().out == "for people\n"


ERRORS = [value for value in vars(errors).values() if isinstance(value, type)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_of_the_tree_is_one_line_with_cause_and_remedy(kind, verb, capsys) -> None:
    verb(raising(kind("The cause\nis here.", "Do this.")))
    expected = 3 if kind is errors.GateError else 2
    assert main(["fake"]) == expected
    assert capsys.readouterr() == ("", "error: The cause is here. Do this.\n")
    assert main(["fake", "--json"]) == expected
    shown = json.loads(capsys.readouterr().out)["error"]
    assert shown == {
        "type": kind.__name__,
        "cause": "The cause is here.",
        "remedy": "Do this.",
        "exit_code": expected,
    }


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_failures_of_the_machine_are_input_errors_not_bugs(number: int, verb, capsys) -> None:
    verb(raising(OSError(number, os.strerror(number), "/some/place")))
    assert main(["fake"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {os.strerror(number)} (/some/place). ")
    assert err.count("\n") == 1


def test_a_missing_package_names_the_extra_to_install(verb, capsys) -> None:
    verb(raising(ModuleNotFoundError("No module named 'torch'", name="torch.nn")))
    assert main(["fake"]) == 2
    assert 'pip install "gemini-edge[compress]"' in capsys.readouterr().err


def test_a_missing_module_of_ours_is_a_bug(verb, capsys) -> None:
    verb(raising(ModuleNotFoundError("No module named 'gemini.nothing'", name="gemini.nothing")))
    assert main(["fake"]) == 1


def test_our_bug_shows_the_traceback_and_says_so(verb, capsys) -> None:
    verb(raising(ZeroDivisionError("by zero")))
    assert main(["fake"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: This is a bug in gemini-edge: ZeroDivisionError: by zero")


def test_ctrl_c_ends_with_130_and_no_traceback(verb, capsys) -> None:
    verb(raising(KeyboardInterrupt()))
    assert main(["fake"]) == 130
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.startswith("error: Interrupted. ")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_real_signal_ends_with_130(sent: signal.Signals) -> None:
    code = (
        "import signal, sys, time, types, gemini.cli as cli\n"
        # A test run in the background inherits that interrupts are ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "fake = types.ModuleType('gemini.cli.fake')\n"
        "fake.HELP = fake.EXAMPLE = 'x'\n"
        "fake.add_arguments = lambda parser: None\n"
        "def body(args): print('ready', flush=True); time.sleep(60)\n"
        "fake.main = body; sys.modules['gemini.cli.fake'] = fake; cli.VERBS = ('fake',)\n"
        "sys.exit(cli.main(['fake']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(sent)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "error: Interrupted. Nothing was left half-written.\n"


def test_a_reader_that_leaves_is_not_a_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "gemini.cli", "doctor", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["compress", "model"],
        ["compress", "model", "--output", "x", "--max-drop", "-1"],
        ["compress", "model", "--output", "x", "--max-drop", "nan"],
        ["compress", "model", "--output", "x", "--task", "translation"],
        ["run", "bundle"],
        ["run", "bundle", "--prompt", "a", "--text", "b"],
        ["run", "bundle", "--prompt", "   "],
        ["run", "bundle", "extra"],
        ["run", "bundle", "--prompt", "half \udcff byte"],
        ["bench"],
        ["bench", "bundle", "--repeat", "0"],
        ["inspect", "/no/such/bundle"],
        ["verify", "/no/such/bundle"],
    ],
    ids=" ".join,
)
def test_bad_usage_ends_with_2_and_one_line(arguments: list[str], capsys) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_bad_usage_is_json_too(capsys) -> None:
    assert main(["compress", "--json"]) == 2
    shown = json.loads(capsys.readouterr().out)["error"]
    assert shown["type"] == "UsageError"
    assert "--output" in shown["cause"]


def test_version_is_that_of_the_distribution(capsys) -> None:
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gemini-edge {version('gemini-edge')}\n"


def test_the_module_runs_like_the_command() -> None:
    done = gemini_edge("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in VERBS)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"caf\xe9", "not UTF-8 (byte 3)"),
        (b"x" * (16 * 1024 * 1024 + 1), "more than 16 MiB"),
    ],
    ids=["nothing", "white space", "latin-1", "huge"],
)
def test_unusable_standard_input_is_refused_before_anything_is_loaded(data: bytes, words: str) -> None:
    command = [sys.executable, "-m", "gemini.cli", "run", "/no/such/bundle", "-"]
    done = subprocess.run(command, input=data, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert words in done.stderr.decode()
