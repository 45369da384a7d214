"""The three lines that most users need.

    model = gemini.load_model("gemini-nano")
    model.generate_text(prompt="Once upon a time", max_length=100, temperature=0.7, top_k=40, top_p=0.95)
    model.generate_caption(gemini.load_image("image.jpg"), language="zh")

A model is a bundle behind its session (`gemini.runtime`): nothing here needs torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from gemini import runtime
from gemini.errors import RequestError, UsageError
from gemini.pretrained import SHIPPED, shipped_bundle
from gemini.runtime.options import CAPTION_BEAMS

if TYPE_CHECKING:
    from PIL.Image import Image

    from gemini.runtime import Label, Session
    from gemini.runtime.options import OptionArgs

# Sizes that exist as configurations, for those who train them.
UNTRAINED = ("gemini-base", "gemini-large")


class Model:
    """A loaded bundle: text in, text out; image in, caption out; text in, label out.

    ``session`` is the runtime's own session, with batches, logits and caches.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    def generate_text(self, prompt: str, max_length: int = 100, **options: Unpack[OptionArgs]) -> str:
        """The prompt and what the model writes after it, at most ``max_length`` new tokens.

        Greedy, unless one of temperature, top_k, top_p, min_p or seed is given. RequestError for an
        impossible option or prompt, or a model that writes no text.
        """
        return prompt + "".join(self.stream_text(prompt, max_length, **options))

    def stream_text(self, prompt: str, max_length: int = 100, **options: Unpack[OptionArgs]) -> Iterator[str]:
        """What :meth:`generate_text` adds to the prompt, piece by piece as it is written."""
        session = self._able("write text", runtime.TextGenerator, runtime.Seq2SeqGenerator)
        source = session.prefixed(prompt) if isinstance(session, runtime.Seq2SeqGenerator) else prompt
        pieces: Iterator[str] = session.stream(source, **{"max_new_tokens": max_length, **options})
        return pieces

    def generate_caption(
        self, image: Any, language: str = "en", max_length: int = 32, num_beams: int = CAPTION_BEAMS
    ) -> str:
        """What is in the image (a path, bytes, a PIL image or a uint8 array (H, W, 3)), in a few words.

        With more beams a likelier caption may be found; one is greedy.
        """
        session = self._able("caption images", runtime.Seq2SeqGenerator)
        captions = {
            name.removeprefix("image-to-text").lstrip("-") or "en": prefix
            for name, prefix in self._prefixes.items()
            if name.startswith("image-to-text")
        }
        if not captions:
            return str(session.generate(image=image, max_new_tokens=max_length, num_beams=num_beams).text)
        if language not in captions:
            raise RequestError(
                f"This model writes no captions in {language!r}.", f"Choose one of {', '.join(captions)}."
            )
        options: OptionArgs = {"max_new_tokens": max_length, "num_beams": num_beams}
        return str(session.generate(captions[language], image, **options).text)

    def classify(self, text: str) -> Label:
        """The likeliest label of a text, with its probability among the labels.

        Of a long text gemini-nano reads the first and the last 64 tokens.
        """
        session = self._able("classify texts", runtime.TextClassifier, runtime.Seq2SeqGenerator)
        best: Label = session.classify([text])[0][0]
        return best

    @property
    def _prefixes(self) -> Mapping[str, str]:
        return self.session.bundle.manifest.generation.prefixes

    def _able(self, what: str, *kinds: type) -> Any:
        if not isinstance(self.session, kinds):
            raise RequestError(
                f"This model does not {what}: its task is {self.session.bundle.manifest.task}.",
                "Load a bundle of another task.",
            )
        return self.session


def load_model(source: str | Path = "gemini-nano", device: str = "auto", threads: int | None = None) -> Model:
    """A model by name or from a bundle's folder.

    Names are those that ship with the package ("gemini-nano") and those of the catalog ("smollm2-135m"),
    which are compressed to int4 at first use; that needs the extra ``[compress]`` and takes minutes.
    UsageError for an unknown name; BundleError and DeviceError as :func:`gemini.runtime.load`.
    """
    name = str(source)
    if Path(source).is_dir():
        return Model(runtime.load(source, device, threads))
    if name in SHIPPED:
        bundle = shipped_bundle(name)
        if not bundle.is_dir():
            raise UsageError(
                f"{name} is not part of this installation.",
                "Train it with `gemini-edge train nano`, compress the result and load that folder.",
            )
        return Model(runtime.load(bundle, device, threads))
    if name in UNTRAINED:
        raise UsageError(
            f"{name} is a configuration that nobody has trained yet; {', '.join(SHIPPED)} is.",
            f'Train it: write a recipe with size = "{name.removeprefix("gemini-")}" for `gemini-edge train`, '
            "compress the result and load that folder.",
        )
    return Model(runtime.load(_compressed(name), device, threads))


def load_image(source: Any) -> Image:
    """A PIL image from a path, bytes or a uint8 array (H, W, 3); RequestError if it is none."""
    from gemini.runtime.vision import open_image

    return open_image(source)


def _compressed(name: str) -> Path:
    """The bundle of a catalog checkpoint in the user's cache, made if it is not there yet."""
    from gemini.model.catalog import CATALOG

    if name not in CATALOG:
        known = ", ".join(dict.fromkeys((*SHIPPED, *CATALOG)))
        raise UsageError(
            f"There is no model and no folder {name!r}.", f"Choose {known}, or give the folder of a bundle."
        )
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    bundle = root / "gemini-edge" / "bundles" / f"{name}-int4"
    if not bundle.is_dir():
        from gemini.pipeline import compress_model

        print(f"Compressing {name} for its first use; the bundle stays in {bundle}.", file=sys.stderr)
        bundle.parent.mkdir(parents=True, exist_ok=True)
        compress_model(name, bundle, "int4", gpu=True)
    return bundle
