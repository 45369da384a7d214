"""The command `gemini-edge`: finds the verb, runs it, turns its outcome into output and an exit code.

    gemini-edge compress smollm2-135m --recipe int4 --output bundle
    gemini-edge run bundle --prompt "Once upon a time"

A verb is one file here with ``HELP``, ``EXAMPLE``, ``add_arguments(parser)`` and ``main(args) -> dict``. Only
the file of the verb asked for is imported, and a verb imports what it works with inside ``main``: so runtime
verbs never touch torch. What a verb prints is for people; what it returns is what ``--json`` shows.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NoReturn

from gemini.cli.failure import Failure, explain
from gemini.cli.output import to_json
from gemini.errors import UsageError

VERBS = (
    "compress",
    "prune",
    "run",
    "bench",
    "eval",
    "inspect",
    "verify",
    "prepack",
    "doctor",
    "data",
    "stories",
    "train",
)
EXIT_CODES = (
    "exit codes: 0 done, 2 bad usage or input, 3 the accuracy gate failed, 1 a bug of ours, "
    "130 interrupted, 141 the reader of our output went away"
)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints go the way of every other bad input: one line, exit code 2, JSON if asked."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}.", f"See `{self.prog} --help`.")


def load_verb(name: str) -> ModuleType:
    """The module of one verb."""
    return importlib.import_module(f"gemini.cli.{name}")


def build_parser(verbs: Sequence[str] = VERBS) -> Parser:
    """The parser that knows `verbs`; every other verb stays unimported."""
    parser = Parser(
        prog="gemini-edge", description="Compress a trained Transformer, prove it, run it without torch."
    )
    parser.epilog = EXIT_CODES
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name in verbs:
        verb = load_verb(name)
        command = commands.add_parser(name, help=verb.HELP, description=verb.HELP, epilog=EXIT_CODES)
        verb.add_arguments(command)
        command.add_argument(
            "--json", action="store_true", help="one line of JSON, the last line of standard output"
        )
        command.set_defaults(main=verb.main)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; never raises."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    try:
        with _termination_as_interrupt():
            return _run(arguments, as_json)
    except SystemExit as leaving:  # --help
        return leaving.code if isinstance(leaving.code, int) else 2
    except BrokenPipeError:
        # The reader left (`gemini-edge run … | head`). Python must not fail again when it closes the output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except BaseException as error:
        return _report(explain(error), as_json)


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a command like Ctrl-C, so that half-written folders are removed on the way out."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: list[str], as_json: bool) -> int:
    chosen = [name for name in VERBS if arguments[:1] == [name]]
    parser = build_parser(chosen or VERBS)
    args = parser.parse_args(arguments)
    if args.version:
        from gemini import __version__

        print(f"gemini-edge {__version__}")
        return 0
    if args.verb is None:
        parser.error("a verb is required")
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = args.main(args)
    if as_json:
        print(to_json(result))
    sys.stdout.flush()
    return 0


def _report(failure: Failure, as_json: bool) -> int:
    if failure.traceback:
        sys.stderr.write(failure.traceback)
    print(f"error: {failure.cause} {failure.remedy}".rstrip(), file=sys.stderr)
    if as_json:
        print(json.dumps({"error": failure.to_dict()}), flush=True)
    return failure.exit_code
