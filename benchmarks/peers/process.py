"""A peer's process as the parent sees it: started, asked, stopped while others run, ended whatever happens.

Adapters are scripts of the folder beside this file; `adapters/wire.py` says what they answer.
"""

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

ADAPTERS = Path(__file__).parent / "adapters"
LONGEST_ANSWER = 64 << 20  # bytes
# One thread count for every library that picks its own, and nothing that leaves the machine.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
}


class PeerError(Exception):
    """Why a peer could not be measured; the text of its row."""


class PeerProcess:
    """One living adapter. Closing kills it and everything it started; so does leaving the `with` block.

    ``pause`` and ``resume`` stop and continue it with signals, so a waiting peer's worker threads, which may
    spin for a while after their last operator, take nothing from the one whose turn it is.
    """

    def __init__(
        self,
        command: Sequence[str],
        threads: int,
        cpus: Sequence[int],
        own_path: bool = False,
        device: str = "cpu",
    ) -> None:
        """command: interpreter and script. own_path: keep PYTHONPATH, which else is not the peer's. On the
        CPU no accelerator is to be seen.

        Raises PeerError when the interpreter cannot be started.
        """
        environment = {name: value for name, value in os.environ.items() if own_path or name != "PYTHONPATH"}
        # Packages come compiled from their installers; a checkout compiles itself once, if it may.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment |= _QUIET | dict.fromkeys(_THREADS, str(threads))
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        # Without a name, so nothing is left behind even when this process is killed.
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._unread, self._closed = b"", False
        self.started = time.perf_counter()
        try:
            self._child = subprocess.Popen(
                [*command, ",".join(map(str, cpus))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                cwd=tempfile.gettempdir(),
                start_new_session=True,  # Ctrl-C reaches the parent, which ends its children
            )
        except OSError as error:
            self._log.close()
            raise PeerError(f"{command[0]} cannot be started ({error.strerror})") from error

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """One request, one answer. PeerError when it crashes, takes longer than ``timeout`` seconds,
        answers no JSON object, or answers with an error.
        """
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        except OSError:
            raise PeerError(self._last_words()) from None
        line = self._read_line(time.perf_counter() + timeout, timeout)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise PeerError(f"its answer is no JSON object: {line[:80].decode(errors='replace')!r}")
        if "error" in answer:
            raise PeerError(_one_line(str(answer["error"])))
        return answer

    def age(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self.started

    def pause(self) -> None:
        """Stop all threads until ``resume``."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after ``pause``."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill the process and its children."""
        if self._closed:
            return
        self._closed = True
        self._signal(signal.SIGKILL)
        for pipe in (self._child.stdin, self._child.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._child.wait()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        # The child leads a process group of its own, which may outlive it.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, number)

    def _read_line(self, deadline: float, timeout: float) -> bytes:
        assert self._child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                left = deadline - time.perf_counter()
                if left <= 0 or not selector.select(left):
                    raise PeerError(f"no answer within {timeout:g} s")
                piece = os.read(self._child.stdout.fileno(), 1 << 16)
                if not piece:
                    raise PeerError(self._last_words())
                self._unread += piece
                if len(self._unread) > LONGEST_ANSWER:
                    raise PeerError(f"its answer is longer than {LONGEST_ANSWER >> 20} MB")
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        """Why it ended: the last line on stderr, or the signal or exit code."""
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(5)
        code = self._child.returncode
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4096))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        ending = "it ended"
        if code is not None:
            ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return _one_line(f"{ending}: {lines[-1]}" if lines else ending)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
