"""The runtime's own kernels for a CPU: where their library lies, and whether a session is to use them.

They stand in a library that the installation builds where there is a C compiler (`runtime/native`), and run
the graphs that a bundle keeps for them (manifest, "fused_graphs"). Without the library, or on another
processor, onnxruntime's kernels run the portable graphs of the same bundle.
"""

from __future__ import annotations

import ctypes
import functools
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING

from gemini.errors import UsageError
from gemini.runtime.fields import damaged

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime as ort
    from numpy.typing import NDArray

    from gemini.runtime.schema import Manifest

VARIABLE = "GEMINI_KERNELS"  # one of these; unset: whichever are the fastest
_OWN, _OWN_IN_AVX2, _OTHERS = "own", "avx2", "onnxruntime"
# What gemini_processor says; 0: the kernels cannot run.
_RUNS, _AVX_VNNI, _AVX512_VNNI, _AVX512_BF16 = 1, 2, 3, 4
_NAMES = {_AVX512_VNNI: "AVX-512 VNNI", _AVX512_BF16: "AVX-512 VNNI and BF16"}
# How weights may be packed, and how many of their rows lie side by side then.
LAYOUTS = {"avx2": 8, "avx512": 16}


@functools.cache
def _library() -> tuple[ctypes.CDLL, Path] | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_fused{suffix}")
        if path.is_file():
            try:
                return ctypes.CDLL(str(path)), path
            except OSError:  # built for another processor or system
                return None
    return None


def _processor() -> int:
    found = _library()
    return 0 if found is None else int(found[0].gemini_processor())


def available() -> bool:
    """Whether the library is there and this processor can run it."""
    return _processor() >= _RUNS


def instructions() -> list[str]:
    """What the own kernels can compute with here, the fastest last, as GEMINI_KERNELS names it."""
    return [] if not available() else [_OWN_IN_AVX2, *([_OWN] if _processor() in _NAMES else [])]


def wanted() -> bool:
    """Whether sessions are to use the own kernels: where they are the faster ones, or as GEMINI_KERNELS says.

    "avx2" lets them do without AVX-512, "own" does not.
    Processors with AVX-VNNI alone, without AVX-512, have onnxruntime's kernels for it.
    UsageError for another value, or where "own" is asked for and cannot be.
    """
    asked, own = os.environ.get(VARIABLE, ""), (_OWN, _OWN_IN_AVX2)
    if asked not in ("", *own, _OTHERS):
        raise UsageError(
            f"{VARIABLE} is {asked!r}.", f'Use "{_OWN}", "{_OWN_IN_AVX2}" or "{_OTHERS}", or unset it.'
        )
    if asked in own and not available():
        raise UsageError(
            f"{VARIABLE} asks for the own kernels, which are not built or do not fit this processor.",
            "Unset it, or install gemini-edge where there is a C compiler.",
        )
    return asked in own or (asked == "" and available() and _processor() != _AVX_VNNI)


def state() -> str:
    """In a word what becomes of the own kernels here: "AVX2", "AVX-512 VNNI" or "AVX-512 VNNI and BF16" where
    they are used, else "not used", "unfit" or "not built"."""
    if _library() is None:
        return "not built"
    if not available():
        return "unfit"
    if not wanted():
        return "not used"
    return _NAMES[_processor()] if layout() == "avx512" else "AVX2"


def layout() -> str:
    """The layout of `LAYOUTS` that sessions of this process read, if they use the own kernels."""
    narrow = os.environ.get(VARIABLE) == _OWN_IN_AVX2 or _processor() not in _NAMES
    return "avx2" if narrow else "avx512"


def graphs_here(manifest: Manifest) -> dict[str, str]:
    """The file of each graph that a session on the CPU opens in this process, by the graph's name: those for
    the own kernels where they are wanted, of these the ones whose weights are packed for it."""
    if not (manifest.fused_graphs and wanted()):
        return dict(manifest.graphs)
    return {**manifest.graphs, **manifest.fused_graphs, **manifest.packed_graphs.get(layout(), {})}


def pack(
    sizes: tuple[int, int, int, int],
    tile: int,
    codes: NDArray[np.generic],
    scales: NDArray[np.generic],
    zeros: NDArray[np.generic] | None,
) -> list[NDArray[np.uint8]]:
    """Weights as the kernels read them in tiles of so many rows (`LAYOUTS`): the bytes of codes, scales and
    zero points (`runtime/native/kernels.h`); with a block size of 0 there are codes alone, and the scales and
    sums of columns are among them (`channels.h`). Only where `available`.

    Args:
        sizes: features (K), outputs (N), bits and block size of a product of a Fused node.
        codes, scales, zeros: as MatMulNBits stores them, or DynamicQuantizeMatMul if the block size is 0.

    Raises:
        BundleError: the kernels know no weights of these sizes, or the constants have others.
        MemoryError: there is not enough memory.
    """
    import numpy as np

    found = _library()
    assert found is not None
    half = scales.dtype == np.float16
    counts = (ctypes.c_size_t * 3)()
    if not found[0].gemini_packed_bytes(*sizes, tile, half, zeros is not None, counts):
        raise damaged(f"the kernels have no weights of the sizes {sizes}")
    k, n, bits, block = sizes
    blocks = -(-k // block) if block else 1
    points = 0 if zeros is None else n * (blocks if bits == 8 else -(-blocks // 2))
    wanted_bytes = (n * blocks * block * bits // 8 or k * n, n * blocks * (2 if half else 4), points)
    if wanted_bytes != (codes.nbytes, scales.nbytes, 0 if zeros is None else zeros.nbytes):
        raise damaged(f"weights of the sizes {sizes} have constants of other sizes")
    room = np.empty(sum(counts) + 64, np.uint8)
    start = -room.ctypes.data % 64
    packed = room[start : start + sum(counts)]
    held = [None if one is None else np.ascontiguousarray(one) for one in (codes, scales, zeros)]
    places = [None if one is None else ctypes.c_void_p(one.ctypes.data) for one in held]
    if not found[0].gemini_pack(*sizes, tile, half, *places, ctypes.c_void_p(packed.ctypes.data)):
        raise MemoryError("weights cannot be packed")
    return np.split(packed, np.cumsum(counts)[:2])


def register(options: ort.SessionOptions, threads: int) -> None:
    """Let a session with these options know the operator of the own kernels; only where `available`."""
    found = _library()
    assert found is not None
    found[0].gemini_use_threads(threads)
    found[0].gemini_allow_vnni(layout() == "avx512")
    options.register_custom_ops_library(str(found[1]))
