"""From a device name to execution providers, and the proof afterwards that the provider is active."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import cache

from gemini.errors import DeviceError

DEVICES = ("auto", "cpu", "cuda")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
Provider = tuple[str, dict[str, str]]
RECORD = {"enable_cuda_graph": "1"}  # beside the options of CUDA: steps may be recorded and replayed


def provider_list(device: str, available: Sequence[str]) -> list[Provider]:
    """Providers to ask onnxruntime for, best first. DeviceError if ``device`` needs one that is not built in.

    The CPU provider follows CUDA because shape arithmetic always runs there; whether CUDA is active is
    checked after loading by :func:`active_device`.
    """
    if device not in DEVICES:
        raise DeviceError(f"The device {device!r} is unknown.", f"Use one of {', '.join(DEVICES)}.")
    if device == "cpu" or (device == "auto" and CUDA not in available):
        return [(CPU, {})]
    if CUDA not in available:
        raise DeviceError(
            "The installed onnxruntime has no CUDA provider.",
            "Run `pip uninstall onnxruntime`, then `pip install 'onnxruntime-gpu[cuda,cudnn]'`: the two "
            f"wheels overwrite each other{_clash_note()}.",
        )
    return [(CUDA, cuda_options()), (CPU, {})]


def cuda_options() -> dict[str, str]:
    """CUDA options: the arena takes what is asked for instead of doubling, as KV buffers are large."""
    return {"arena_extend_strategy": "kSameAsRequested", "do_copy_in_default_stream": "1"}


@cache
def load_libraries() -> None:
    """CUDA and cuDNN out of packages named nvidia-*, where they are installed beside onnxruntime.

    onnxruntime finds those of the system by itself. It prints what it does not find, which is no error yet.
    """
    from onnxruntime import preload_dlls

    with redirect_stdout(io.StringIO()):
        preload_dlls()


def active_device(device: str, asked: Sequence[Provider], active: Sequence[str]) -> str:
    """The device a loaded session runs on. DeviceError if "cuda" was asked for and is not active.

    "auto" may use the CPU when CUDA does not start, but says so with a warning.
    """
    if asked[0][0] == CUDA and (not active or active[0] != CUDA):
        if device == "cuda":
            raise DeviceError(
                "onnxruntime could not start its CUDA provider on this machine.",
                "Check the driver with nvidia-smi and the CUDA and cuDNN libraries, or use --device cpu.",
            )
        warnings.warn(
            "CUDA is built into onnxruntime but did not start; running on the CPU.",
            RuntimeWarning,
            stacklevel=2,
        )
    return "cuda" if active and active[0] == CUDA else "cpu"


def _clash_note() -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, rarely needed

    try:
        version("onnxruntime")
        version("onnxruntime-gpu")
    except PackageNotFoundError:
        return ""
    return ", and both are installed here"
