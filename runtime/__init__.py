"""The torch-free runtime: a bundle is verified, loaded and served with onnxruntime, numpy and tokenizers.

from gemini.runtime import load
print(load("out/").generate("The sea is").text)
"""

import os

# onnxruntime reports usage to its vendor unless this is set before its first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from gemini.runtime.bundle import Bundle, file_digest, read_bundle, safe_member, seal
from gemini.runtime.encoder import Embedder, Label, TextClassifier
from gemini.runtime.loading import Session, load
from gemini.runtime.options import GenerationOptions
from gemini.runtime.schema import SCHEMA_VERSION, Manifest
from gemini.runtime.seq2seq import Seq2SeqGenerator
from gemini.runtime.text import TextGenerator
from gemini.runtime.transcript import Generation
from gemini.runtime.vision import ImageClassifier

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
