"""From a bundle folder to the session for its task."""

from __future__ import annotations

from pathlib import Path

from gemini.runtime.bundle import hashed_meanwhile
from gemini.runtime.encoder import Embedder, TextClassifier
from gemini.runtime.seq2seq import Seq2SeqGenerator
from gemini.runtime.session import open_graph
from gemini.runtime.text import TextGenerator
from gemini.runtime.vision import ImageClassifier

Session = TextGenerator | Embedder | TextClassifier | ImageClassifier | Seq2SeqGenerator
_SESSIONS: dict[str, type[TextGenerator] | type[Embedder] | type[TextClassifier] | type[ImageClassifier]] = {
    "text-generation": TextGenerator,
    "feature-extraction": Embedder,
    "text-classification": TextClassifier,
    "image-classification": ImageClassifier,
}


def load(
    bundle: str | Path,
    device: str = "auto",
    threads: int | None = None,
    verify: bool = True,
    spinning: bool = True,
) -> Session:
    """Open a bundle for its task.

    ``device`` is "auto", "cpu" or "cuda"; ``threads`` defaults to what the cgroup and the affinity mask
    allow; ``verify=False`` skips hashing the files (paths, sizes and the manifest are always checked);
    ``spinning=False`` trades speed for idle cores between operators. Raises BundleError or DeviceError.
    """
    with hashed_meanwhile(bundle, verify) as opened:
        manifest = opened.manifest
        if manifest.family == "encoder-decoder":
            graphs = {name: open_graph(opened, name, device, threads, spinning) for name in manifest.graphs}
            return Seq2SeqGenerator(opened, graphs)
        return _SESSIONS[manifest.task](
            opened, open_graph(opened, manifest.family, device, threads, spinning)
        )
