"""From a bundle folder to the session for its task."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from gemini.errors import UsageError
from gemini.runtime.background import Background

if TYPE_CHECKING:
    from gemini.runtime.bundle import Bundle
    from gemini.runtime.encoder import Embedder, TextClassifier
    from gemini.runtime.seq2seq import Seq2SeqGenerator
    from gemini.runtime.session import Graph
    from gemini.runtime.text import TextGenerator
    from gemini.runtime.tokenizer import TextTokenizer
    from gemini.runtime.vision import ImageClassifier

Session: TypeAlias = "TextGenerator | Embedder | TextClassifier | ImageClassifier | Seq2SeqGenerator"

# The module of each family's sessions: imported once the family is known.
_MODULES = {"decoder": "text", "encoder": "encoder", "vision": "vision", "encoder-decoder": "seq2seq"}
_LEAD = 0.005  # seconds in which onnxruntime lets go of the interpreter's lock


def load(
    bundle: str | Path,
    device: str = "auto",
    threads: int | None = None,
    verify: bool = True,
    spinning: bool = True,
    skip_tokenizer: bool = False,
) -> Session:
    """Open a bundle for its task.

    ``device`` is "auto", "cpu" or "cuda", which needs a bundle with graphs in half precision (compress
    --gpu); "auto" takes the CPU without them. ``threads`` defaults to what the cgroup and the affinity mask
    allow; ``verify=False`` skips hashing the files (paths, sizes and the manifest are always checked);
    ``spinning=False`` trades speed for idle cores between operators. ``skip_tokenizer=True`` leaves out the
    tokenizer of a text generator, for who has token ids and wants them back: reading it takes longer than
    opening the graph. Raises BundleError or DeviceError.
    """
    from gemini.runtime.bundle import hashed_meanwhile

    # Weights are hashed while onnxruntime is imported, and graphs are opened while the tokenizer is read and
    # the session's modules are imported: each takes 0.1 to 0.2 s, and the first of each pair needs no Python.
    with hashed_meanwhile(bundle, verify, device) as opened:
        from gemini.runtime.hugepages import trim_heap
        from gemini.runtime.session import open_graph

        family = opened.manifest.family
        if skip_tokenizer and family != "decoder":
            raise UsageError(
                f"The bundle's task is {opened.manifest.task}, which has no use for skip_tokenizer.",
                "Load it without.",
            )

        def graphs() -> dict[str, Graph]:
            return {
                name: open_graph(opened, name, device, threads, spinning) for name in opened.manifest.graphs
            }

        with Background(graphs) as opening:
            import_module(f"gemini.runtime.{_MODULES[family]}")
            tokenizer = None if family == "vision" or skip_tokenizer else _tokenizer(opened)
            session = _session(opened, opening.result(), tokenizer)
        trim_heap()
        return session


def _tokenizer(bundle: Bundle) -> TextTokenizer:
    """Its parser keeps the interpreter's lock for as long as it takes, so onnxruntime has to begin before."""
    from gemini.runtime.tokenizer import TextTokenizer

    time.sleep(_LEAD)
    return TextTokenizer.read(bundle)


def _session(bundle: Bundle, graphs: Mapping[str, Graph], tokenizer: TextTokenizer | None) -> Session:
    family, task = bundle.manifest.family, bundle.manifest.task
    if family == "decoder":
        from gemini.runtime.text import TextGenerator

        return TextGenerator(bundle, graphs[family], tokenizer)
    if tokenizer is None:
        from gemini.runtime.vision import ImageClassifier

        return ImageClassifier(bundle, graphs[family])
    if family == "encoder-decoder":
        from gemini.runtime.seq2seq import Seq2SeqGenerator

        return Seq2SeqGenerator(bundle, graphs, tokenizer)
    from gemini.runtime.encoder import Embedder, TextClassifier

    kind = Embedder if task == "feature-extraction" else TextClassifier
    return kind(bundle, graphs[family], tokenizer)
