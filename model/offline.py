"""The one place that imports transformers: offline, quiet, and with a clear error when it is missing."""

import os
from types import ModuleType

from gemini.errors import CheckpointError


def import_transformers() -> ModuleType:
    """Return the ``transformers`` module with every route to the network and every log below errors closed.

    The offline switches are read when huggingface_hub and transformers are first imported, so they are set
    here, before the import; ``local_files_only`` at each call covers a process that imported them earlier.

    Raises:
        CheckpointError: torch, transformers or optimum is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # tokenizers warns on every later fork (the benchmarks start processes) unless this is settled.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        import optimum.exporters.tasks  # noqa: F401  (imported for the check only)
        import torch  # noqa: F401
        import transformers

        import gemini.model.gemini  # noqa: F401  (makes transformers know the family)
    except ImportError as error:
        raise CheckpointError(
            f"Reading a checkpoint needs torch, transformers and optimum ({error}).",
            "Install them with `pip install 'gemini-edge[compress]'`.",
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's text, at most ``limit`` characters, for a one-line message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:limit].rstrip(" .:")
