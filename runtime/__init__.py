"""The torch-free runtime: a bundle is verified, loaded and served with onnxruntime, numpy and tokenizers.

from gemini.runtime import load
print(load("out/").generate("The sea is").text)
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gemini.runtime.loading import Session, load

if TYPE_CHECKING:
    from gemini.runtime.bundle import Bundle, file_digest, read_bundle, safe_member, seal
    from gemini.runtime.encoder import Embedder, Label, TextClassifier
    from gemini.runtime.options import GenerationOptions
    from gemini.runtime.schema import SCHEMA_VERSION, Manifest
    from gemini.runtime.seq2seq import Seq2SeqGenerator
    from gemini.runtime.text import TextGenerator
    from gemini.runtime.transcript import Generation
    from gemini.runtime.vision import ImageClassifier

# onnxruntime reports usage to its vendor unless this is set before its first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Threads of numpy's linear algebra poll for 0.1 s after they start, on cores that open a bundle meanwhile,
# unless this is set before its first import: the logarithm of clock ticks, so they poll for half a
# millisecond instead.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")

# Imported when first asked for: a process that serves one bundle needs the modules of one family, and most
# of them only while its graphs are opened.
_LAZY = {
    "SCHEMA_VERSION": "schema",
    "Bundle": "bundle",
    "Embedder": "encoder",
    "Generation": "transcript",
    "GenerationOptions": "options",
    "ImageClassifier": "vision",
    "Label": "encoder",
    "Manifest": "schema",
    "Seq2SeqGenerator": "seq2seq",
    "TextClassifier": "encoder",
    "TextGenerator": "text",
    "file_digest": "bundle",
    "read_bundle": "bundle",
    "safe_member": "bundle",
    "seal": "bundle",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "SCHEMA_VERSION",
    "Bundle",
    "Embedder",
    "Generation",
    "GenerationOptions",
    "ImageClassifier",
    "Label",
    "Manifest",
    "Seq2SeqGenerator",
    "Session",
    "TextClassifier",
    "TextGenerator",
    "file_digest",
    "load",
    "read_bundle",
    "safe_member",
    "seal",
]
