"""From a bundle folder to the session for its task."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gemini.runtime import kernels
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
        soon = not (manifest.fused_graphs and kernels.wanted())
        tokenizer = None if manifest.family == "vision" else reading.submit(_tokenizer, opened, soon)
        if tokenizer and not soon:
            tokenizer.result()
        graphs = {name: open_graph(opened, name, device, threads, spinning) for name in manifest.graphs}
        words = tokenizer.result() if tokenizer else None
        trim_heap()
        if words is None:
            return ImageClassifier(opened, graphs["vision"])
        if manifest.family == "encoder-decoder":
            return Seq2SeqGenerator(opened, graphs, words)
        return _OF_TEXT[manifest.task](opened, graphs[manifest.family], words)


def _tokenizer(bundle: Bundle, soon: bool) -> TextTokenizer:
    """The tokenizer; ``soon``: once onnxruntime is at work.

    Its parser keeps the interpreter's lock for as long as it takes: 0.2 s with 49 thousand tokens. If it
    began first, opening a graph would have to wait for it. The own kernels open a graph in half that time, so
    there it does begin first, and the 30 MB that it has no use for afterwards do not come on top of weights.
    """
    if soon:
        time.sleep(_LEAD)
    tokenizer = TextTokenizer.read(bundle)
    trim_heap()
    return tokenizer
