"""From a bundle folder to the session for its task."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gemini.runtime.bundle import Bundle, hashed_meanwhile
from gemini.runtime.encoder import Embedder, TextClassifier
from gemini.runtime.hugepages import trim_heap
from gemini.runtime.seq2seq import Seq2SeqGenerator
from gemini.runtime.session import open_graph
from gemini.runtime.text import TextGenerator
from gemini.runtime.tokenizer import TextTokenizer
from gemini.runtime.vision import ImageClassifier

_LEAD = 0.03  # seconds that onnxruntime needs to let go of the interpreter's lock

Session = TextGenerator | Embedder | TextClassifier | ImageClassifier | Seq2SeqGenerator

_OF_TEXT: dict[str, type[TextGenerator] | type[Embedder] | type[TextClassifier]] = {
    "text-generation": TextGenerator,
    "feature-extraction": Embedder,
    "text-classification": TextClassifier,
}


def load(
    bundle: str | Path,
    device: str = "auto",
    threads: int | None = None,
    verify: bool = True,
    spinning: bool = True,
) -> Session:
    """Open a bundle for its task.

    ``device`` is "auto", "cpu" or "cuda", which needs a bundle with graphs in half precision (compress
    --gpu); "auto" takes the CPU without them. ``threads`` defaults to what the cgroup and the affinity mask
    allow; ``verify=False`` skips hashing the files (paths, sizes and the manifest are always checked);
    ``spinning=False`` trades speed for idle cores between operators. Raises BundleError or DeviceError.
    """
    # onnxruntime opens graphs without the interpreter's lock: the tokenizer is read, and weights are hashed,
    # on the other cores meanwhile.
    with hashed_meanwhile(bundle, verify) as opened, ThreadPoolExecutor(1) as reading:
        manifest = opened.manifest
        tokenizer = None if manifest.family == "vision" else reading.submit(_tokenizer_soon, opened)
        graphs = {name: open_graph(opened, name, device, threads, spinning) for name in manifest.graphs}
        words = tokenizer.result() if tokenizer else None
        trim_heap()
        if words is None:
            return ImageClassifier(opened, graphs["vision"])
        if manifest.family == "encoder-decoder":
            return Seq2SeqGenerator(opened, graphs, words)
        return _OF_TEXT[manifest.task](opened, graphs[manifest.family], words)


def _tokenizer_soon(bundle: Bundle) -> TextTokenizer:
    """The tokenizer, once onnxruntime is at work.

    Its parser keeps the interpreter's lock for as long as it takes. If it began first, opening a graph would
    have to wait for it: 0.2 s with 49 thousand tokens. What it has no use for afterwards goes back before
    weights are packed.
    """
    time.sleep(_LEAD)
    tokenizer = TextTokenizer.read(bundle)
    trim_heap()
    return tokenizer
