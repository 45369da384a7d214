"""The error tree: every failure a user can cause or meet carries its cause and its remedy.

    GeminiEdgeError
    ├── UsageError        bad arguments, unreadable text or image files
    ├── CheckpointError   the model that should be compressed cannot be read
    ├── DataError         training data is missing, damaged, or cannot be fetched
    ├── RecipeError       the recipe is malformed or does not fit the model
    ├── ExportError       the model cannot be expressed as an onnxruntime graph
    ├── VerificationError the exported graph does not compute what torch computes
    ├── BundleError       a bundle is damaged, hostile, too new, or cannot be written
    ├── DeviceError       the execution provider asked for is not active
    ├── RequestError      a prompt, token id or generation option is out of range
    └── GateError         the bundle lost more accuracy than the user allowed

This module imports nothing, so every folder may import it.
"""


class GeminiEdgeError(Exception):
    """Base of all errors that are not our bugs; ``exit_code`` is what the command line returns."""

    exit_code = 2

    def __init__(self, cause: str, remedy: str = "") -> None:
        self.cause = cause
        self.remedy = remedy
        super().__init__(f"{cause} {remedy}" if remedy else cause)


class UsageError(GeminiEdgeError):
    """Arguments or input files that cannot be used."""


class CheckpointError(GeminiEdgeError):
    """A checkpoint that cannot be read."""


class DataError(GeminiEdgeError):
    """Training data that is missing, damaged or cannot be fetched."""


class RecipeError(GeminiEdgeError):
    """A recipe with unknown keys, unknown passes or impossible options."""


class ExportError(GeminiEdgeError):
    """A model that cannot be expressed with the operators of the installed runtime."""


class VerificationError(ExportError):
    """A graph whose numbers differ from torch by more than the stated tolerance."""


class BundleError(GeminiEdgeError):
    """A bundle that is damaged, hostile, too new or cannot be written."""


class DeviceError(GeminiEdgeError):
    """An execution provider that is not available or not active."""


class RequestError(GeminiEdgeError):
    """A prompt, token id or generation option that the session cannot serve."""


class GateError(GeminiEdgeError):
    """The measured accuracy loss exceeds the limit the user gave."""

    exit_code = 3
