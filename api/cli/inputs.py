"""What arrives through arguments and standard input: bundles, where they run, and text."""

import argparse
import sys
from pathlib import Path

from gemini.errors import UsageError
from gemini.pretrained import SHIPPED, shipped_bundle

MAX_STDIN_BYTES = 16 * 1024 * 1024
A_BUNDLE = f"a bundle's folder, or {', '.join(SHIPPED)}, which comes with the package"


def bundle_folder(text: str) -> Path:
    """The folder of a bundle: `text` itself, or that of the model that ships under this name."""
    return shipped_bundle(text) if text in SHIPPED and not Path(text).is_dir() else Path(text)


def add_session_options(parser: argparse.ArgumentParser) -> None:
    """Where a bundle runs: `--device` and `--threads`, as `gemini.runtime.load` takes them."""
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, or cuda, which needs a bundle made with --gpu (default: auto)",
    )
    parser.add_argument(
        "--threads", metavar="N", type=int, help="threads (default: what cgroup and affinity allow)"
    )


def read_stdin() -> str:
    """All of standard input, at most 16 MiB of UTF-8.

    Raises UsageError when it is empty, larger, or not UTF-8.
    """
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise UsageError("Standard input holds more than 16 MiB.", "Pipe in a shorter text.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"Standard input is not UTF-8 (byte {error.start}).",
            "Convert it, for example with iconv -t UTF-8.",
        ) from error
    if not text.strip():
        raise UsageError("Standard input is empty.", "Pipe in the text, or use --prompt or --text.")
    return text


def checked_text(text: str, option: str) -> str:
    """`text` of a command-line argument; UsageError when it is empty or held bytes that are no characters."""
    if not text.strip():
        raise UsageError(f"The text given to {option} is empty.", "Give it at least one word.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"The text given to {option} is not in this locale's encoding.", "Use UTF-8.")
    return text


def read_text(path: str) -> str:
    """The text of a file, at most 16 MiB of UTF-8. UsageError when it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_STDIN_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a text ({error}).", "Give a UTF-8 file.") from error
    if len(data) > MAX_STDIN_BYTES:
        raise UsageError(f"{path} holds more than 16 MiB.", "Give a shorter file.")
    return text
