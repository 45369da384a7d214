"""From an exception to what the user reads: cause, remedy, exit code."""

import errno
import traceback
from dataclasses import dataclass
from typing import Any

from gemini.errors import GeminiEdgeError

# Failures of the machine or of a path, which no code of ours can mend: what to do about each.
_SYSTEM_REMEDIES = {
    errno.ENOSPC: "Free some space or choose another disk; nothing was left half-written.",
    errno.EDQUOT: "Free some of your disk quota or choose another disk; nothing was left half-written.",
    errno.EACCES: "Check the permissions or choose another path.",
    errno.EPERM: "Check the permissions or choose another path.",
    errno.EROFS: "Choose a path on a disk that can be written.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "Check the path.",
    errno.EISDIR: "Name a file, not a folder.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
}
# Which extra brings a package that is imported on demand; all others belong to `compress`.
_EXTRAS = {"PIL": "vision", "jinja2": "chat", "matplotlib": "report"}


@dataclass(frozen=True)
class Failure:
    """Why a command ended early; ``traceback`` is set for our own bugs only."""

    kind: str
    cause: str
    remedy: str
    exit_code: int
    traceback: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The object under ``error`` of the JSON output."""
        return {"type": self.kind, "cause": self.cause, "remedy": self.remedy, "exit_code": self.exit_code}


def explain(error: BaseException) -> Failure:
    """Sort `error` into the user's, the machine's and ours."""
    kind = type(error).__name__
    if isinstance(error, GeminiEdgeError):
        return Failure(kind, _one_line(error.cause), _one_line(error.remedy), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Failure("Interrupted", "Interrupted.", "Nothing was left half-written.", 130)
    if isinstance(error, MemoryError):
        return Failure(
            kind, "The machine ran out of memory.", "Close other programs or use a smaller model.", 2
        )
    if isinstance(error, OSError) and error.errno in _SYSTEM_REMEDIES:
        place = f" ({error.filename})" if error.filename else ""
        return Failure(kind, f"{error.strerror}{place}.", _SYSTEM_REMEDIES[error.errno], 2)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("gemini"):
        package = error.name.partition(".")[0]
        remedy = f'Run: pip install "gemini-edge[{_EXTRAS.get(package, "compress")}]".'
        return Failure(kind, f"The package {package} is not installed.", remedy, 2)
    cause = f"This is a bug in gemini-edge: {kind}: {error}".rstrip(": ")
    return Failure(
        kind,
        _one_line(cause),
        "Please report it with the lines above.",
        1,
        "".join(traceback.format_exception(error)),
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
