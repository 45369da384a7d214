"""What a device relies on: no torch, no network, no telemetry, a light import; each in a fresh process."""

import os
import subprocess
import sys

import pytest

GENERATE = """
from gemini.runtime import load
session = load({path!r})
text = session.generate("the sea", max_new_tokens=8, temperature=0.9, seed=1, stop="@@").text
assert text == "".join(session.stream("the sea", max_new_tokens=8, temperature=0.9, seed=1, stop="@@"))
session.generate("hi", chat=True, max_new_tokens=2)
session.logits([[1, 2, 3]])
"""


def python(code, **environment):
    clean = {name: text for name, text in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_full_generate_imports_nothing_of_the_build_side(shared_toy):
    heavy = (
        "torch",
        "transformers",
        "onnx",
        "onnxscript",
        "onnx_ir",
        "optimum",
        "huggingface_hub",
        "safetensors",
        "PIL",
    )
    code = GENERATE.format(path=str(shared_toy.path))
    assert python(f"{code}\nimport sys\nprint([name for name in {heavy!r} if name in sys.modules])") == "[]\n"


def test_jinja2_is_imported_by_chat_prompts_only():
    assert python("import gemini.runtime, sys; print('jinja2' in sys.modules)") == "False\n"


def test_a_full_generate_opens_no_socket(shared_toy):
    hook = """
import sys
seen = []
def watch(event, arguments):
    if event.startswith("socket.") or event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
        seen.append(event)
sys.addaudithook(watch)
import socket
def refuse(*arguments, **options):
    raise AssertionError("a socket was opened")
"""
    # Code below Python is not audited: what the process holds open at the end is asked of the kernel.
    native = """
import os, pathlib
links = [os.readlink(link) for link in pathlib.Path("/proc/self/fd").iterdir() if os.path.islink(link)]
print(seen, [link for link in links if link.startswith("socket:")])
"""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("the platform has no /proc to list open sockets")
    assert python(hook + GENERATE.format(path=str(shared_toy.path)) + native) == "[] []\n"


def test_telemetry_is_off_before_onnxruntime_is_imported():
    code = """
import builtins, os, sys
original, states = builtins.__import__, []
def watch(name, *rest, **options):
    if name.split(".")[0] == "onnxruntime" and "onnxruntime" not in sys.modules:
        states.append(os.environ.get("ORT_DISABLE_TELEMETRY"))
    return original(name, *rest, **options)
builtins.__import__ = watch
import gemini.runtime
assert not states  # it is imported when something needs it
gemini.runtime.TextGenerator
print(set(states))
"""
    assert python(code) == "{'1'}\n"


def test_a_user_who_sets_the_variable_keeps_it():
    code = "import gemini.runtime, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert python(code, ORT_DISABLE_TELEMETRY="0") == "0\n"


def test_importing_the_runtime_loads_little():
    code = """
import sys
before = set(sys.modules)
import gemini.runtime
print(*sorted(set(sys.modules) - before), sep="\\n")
"""
    added = python(code).split()
    # Modules and not seconds, which depend on the machine; `gemini-edge bench` reports the time of a start.
    own = {name for name in added if name.split(".")[0] == "gemini"}
    assert own == {"gemini"} | {
        f"gemini.{m}" for m in ("errors", "runtime", "runtime.background", "runtime.loading")
    }
    assert {name.split(".")[0] for name in added} - {"gemini"} <= sys.stdlib_module_names


def test_a_text_generator_loads_the_modules_of_its_family(shared_toy):
    code = f"""
import sys
from gemini.runtime import load
load({str(shared_toy.path)!r}).generate("the sea", max_new_tokens=2)
print(*sorted(set(sys.modules)), sep="\\n")
"""
    loaded = set(python(code).split())
    assert "gemini.runtime.text" in loaded
    others = ("encoder", "seq2seq", "vision", "speculate", "draft_model", "lookup", "beams")
    assert not loaded & {f"gemini.runtime.{name}" for name in others}
    assert not loaded & {"logging", "concurrent.futures", "numpy.random"}  # 13 ms, and 1 MB


def test_every_name_of_the_runtime_is_there():
    import gemini.runtime

    for name in gemini.runtime.__all__:
        assert getattr(gemini.runtime, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = gemini.runtime.nothing_of_the_kind
