"""Text generation from a source: a text, an image, or both, through an encoder.

    generator = load("gemini/")
    print(generator.generate("<continue>Once upon a time").text)
    for piece in generator.stream("<caption><en>", image="cat.png"): print(piece, end="")

The encoder runs once a request; what it returns are the keys and values of the decoder's cross attention,
which stay where they are while the decoder runs token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import onnxruntime as ort
from numpy.typing import ArrayLike, NDArray

from gemini.errors import RequestError
from gemini.runtime import kv
from gemini.runtime.bundle import Bundle
from gemini.runtime.checks import check_encoder, check_graph, checked_rows, cross_names
from gemini.runtime.decoder import Decoder, LiveDecoders
from gemini.runtime.encoder import BATCH, Label, check_texts, ranked
from gemini.runtime.fields import damaged
from gemini.runtime.generate import Inference, OnToken, generate_tokens, new_token_limit
from gemini.runtime.options import GenerationOptions, OptionArgs, make_options
from gemini.runtime.sampling import softmax
from gemini.runtime.schema import EncoderDecoderModel
from gemini.runtime.scoring import all_logits, split_window
from gemini.runtime.session import Graph, require, run_bound, run_graph
from gemini.runtime.tokenizer import TextTokenizer
from gemini.runtime.transcript import Generation, Transcript, pieces
from gemini.runtime.vision import Preprocessing, parse_preprocessing, preprocess_images

if TYPE_CHECKING:
    from llguidance import LLTokenizer

TEXT = "text2text-generation"  # the task whose prefix a prompt gets
CAPTION = "image-to-text"  # the task whose prefix an image without text gets
CLASSIFICATION = "text-classification"  # the task whose prefix a text to classify gets


class Seq2SeqGenerator:
    """A session for generation from a source. Each has a cache of its own, so several may be in flight."""

    def __init__(self, bundle: Bundle, graphs: Mapping[str, Graph], tokenizer: TextTokenizer) -> None:
        model = bundle.manifest.model
        if not isinstance(model, EncoderDecoderModel):
            raise damaged("the manifest describes no encoder-decoder")
        info = bundle.manifest.generation
        special = (*info.decoder_start_ids, *info.suppressed_ids)
        if not info.decoder_start_ids or max(special) >= model.decoder.vocab_size:
            raise damaged("the manifest names no token to start with, or one outside the vocabulary")
        if max(info.label_ids.values(), default=0) >= model.decoder.vocab_size:
            raise damaged("the token of a label lies outside the vocabulary")
        self.encoder_graph, self.graph = graphs["encoder"], graphs["decoder"]
        self.vision_graph = graphs.get("vision")
        check_encoder(self.encoder_graph, model)
        check_graph(self.graph, model.decoder, model.cross)
        if ("image_features" in model.inputs) != (self.vision_graph is not None):
            raise damaged("the graphs do not fit the encoder's inputs")
        if self.vision_graph is not None:
            require(self.vision_graph, ["pixel_values"], ["image_features"])
        self.bundle, self.model = bundle, model
        self.device, self.threads = self.graph.device, self.graph.threads
        self.tokenizer = tokenizer
        self.eos = frozenset(info.eos_token_ids)
        try:
            make_options(info.defaults, {})
        except RequestError as error:
            raise damaged(f"a generation default is impossible: {error.cause}") from error
        self._live = LiveDecoders()

    @property
    def takes_text(self) -> bool:
        return "input_ids" in self.model.inputs

    @property
    def takes_images(self) -> bool:
        return self.model.image is not None

    def generate(
        self, text: str | Sequence[str] | None = None, image: Any = None, **options: Unpack[OptionArgs]
    ) -> Generation | list[Generation]:
        """Answer one source or a list of them: texts, images (path, bytes, PIL image, uint8 array), or both.

        An image without a text gets the prefix of the model's captioning task, if it has one. Options that
        are not given come from the bundle. RequestError for what the model cannot read.
        """
        sources, pixels, single = self._sources(text, image)
        chosen = self._options(options)
        count = len(pixels) if sources is None and pixels is not None else len(sources or ())
        transcript = Transcript(self.tokenizer, chosen, self.eos, count)
        tokens, reasons = self._run(sources, pixels, chosen, transcript)
        lengths = [0] * count if sources is None else [len(source) for source in sources]
        results = transcript.finished(tokens, reasons, lengths)
        return results[0] if single else results

    def stream(
        self, text: str | None = None, image: Any = None, **options: Unpack[OptionArgs]
    ) -> Iterator[str]:
        """The text of :meth:`generate` for one source, piece by piece, in whole characters.

        The source is checked and encoded by this call, before the first piece is asked for.
        """
        sources, pixels, single = self._sources(text, image)
        if not single:
            raise RequestError("A stream takes one source.", "Use generate() for a list of sources.")
        chosen = self._options(options)
        prompts = self._starts(1, chosen)
        limit = new_token_limit(prompts, chosen, self.model.decoder.context_length)
        inference = self._constrained(self.decoder(self.encode(sources, pixels), limit), chosen)
        return pieces(inference, prompts, self.tokenizer, chosen, self.eos, limit)

    def generate_ids(
        self,
        sources: Sequence[Sequence[int]] | None,
        pixel_values: NDArray[np.float32] | None = None,
        options: GenerationOptions | None = None,
        on_token: OnToken | None = None,
    ) -> list[list[int]]:
        """New token ids (the end token included) for sources of token ids and pixels (B, C, H, W)."""
        return self._run(sources, pixel_values, options or self._options({}), on_token)[0]

    def classify(self, texts: Sequence[str]) -> list[list[Label]]:
        """All labels of each text, best first, with the probability of their token among those of labels.

        Of a text that is longer than those the model was taught to classify, both ends are read. RequestError
        for a model that does not classify.
        """
        info = self.bundle.manifest.generation
        if not info.label_ids:
            raise RequestError("This model does not classify texts.", "Use a bundle of a text classifier.")
        check_texts(texts)
        longest = min(info.longest_classified or self.model.context_length, self.model.context_length)
        prefix = info.prefixes.get(CLASSIFICATION, "")
        sources = [_both_ends(self.tokenizer.encode(prefix + text), longest) for text in texts]
        logits = np.empty((len(sources), len(info.label_ids)), np.float32)
        order = sorted(range(len(sources)), key=lambda row: len(sources[row]))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            first = self.logits([sources[row] for row in rows], np.zeros((len(rows), 1), np.int64))[:, 0]
            logits[rows] = first[:, list(info.label_ids.values())]
        return ranked(softmax(logits), list(info.label_ids))

    def prefixed(self, prompt: str) -> str:
        """The prompt behind what the model's text task begins with, unless it names a task itself."""
        prefixes = self.bundle.manifest.generation.prefixes
        named = any(prompt.startswith(prefix) for prefix in prefixes.values())
        return prompt if named else prefixes.get(TEXT, "") + prompt

    def preprocess(self, images: Sequence[Any]) -> NDArray[np.float32]:
        """pixel_values float32 (n, C, H, W) from paths, bytes, PIL images or uint8 arrays (H, W, 3)."""
        return preprocess_images(images, self._preprocessing)

    def encode(
        self,
        sources: Sequence[Sequence[int]] | NDArray[np.int64] | None,
        pixel_values: NDArray[np.float32] | None = None,
    ) -> dict[str, ort.OrtValue]:
        """What the decoder reads of the sources: their mask, and keys and values, on the session's device."""
        feeds = self._feeds(sources, pixel_values)
        binding = self.encoder_graph.session.io_binding()
        names = ["cross_mask", *cross_names(self.model.cross)]
        held = {name: kv.to_device(array, "cpu") for name, array in feeds.items()}
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, self.device, 0)
        run_bound(self.encoder_graph, binding)
        values = dict(zip(names, binding.get_outputs(), strict=True))
        return {name: value for name, value in values.items() if name in self.graph.inputs}

    def decoder(self, encoded: Mapping[str, ort.OrtValue], new_tokens: int = 0) -> Decoder:
        """A fresh batch over sources that are encoded, with a cache planned for ``new_tokens``."""
        suppressed = self.bundle.manifest.generation.suppressed_ids
        decoder = Decoder(self.graph, self.model.decoder, new_tokens, encoded, suppressed)
        self._live.add(decoder)
        return decoder

    def logits(
        self,
        sources: Sequence[Sequence[int]] | NDArray[np.int64] | None,
        ids: ArrayLike,
        pixel_values: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Teacher forcing: logits float32 (B, T + 1, V) over the start token and ids (B, T).

        Position t predicts ids[:, t]; the last one predicts what would follow.
        """
        rows = checked_rows(ids, self.model.decoder)
        start = self.bundle.manifest.generation.decoder_start_ids
        encoded = {name: value.numpy() for name, value in self.encode(sources, pixel_values).items()}
        tokens = np.stack([np.concatenate([np.array(start, np.int64), row]) for row in rows])
        return all_logits(self.graph, self.model.decoder, tokens, constants=encoded)[:, len(start) - 1 :]

    def continuation(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Of a window (1, S): the encoder reads its first half, the decoder is forced along the rest.

        Logits (1, n, V): the first n - 1 predict the window's last n - 1 tokens.
        """
        source, target = split_window(ids, self._continue_prefix)
        return self.logits(source, target)

    def inference(
        self, new_tokens: int = 0, pixel_values: NDArray[np.float32] | None = None
    ) -> SourceInference:
        """The whole model behind prefill and step: what a benchmark measures."""
        return SourceInference(self, new_tokens, pixel_values)

    def memory(self) -> dict[str, int]:
        """Bytes: "weights" on disk, and of all batches in flight what :meth:`Decoder.memory` says."""
        return {"weights": self.bundle.weight_bytes, **self._live.memory()}

    def close(self) -> None:
        """Free the caches. The session itself is freed with the object."""
        self._live.close()

    def _run(
        self,
        sources: Sequence[Sequence[int]] | None,
        pixels: NDArray[np.float32] | None,
        options: GenerationOptions,
        on_token: OnToken | None,
    ) -> tuple[list[list[int]], list[str]]:
        count = len(sources) if sources is not None else len(pixels) if pixels is not None else 0
        prompts = self._starts(count, options)
        limit = new_token_limit(prompts, options, self.model.decoder.context_length)
        encoded = self.encode(sources, pixels)
        if options.searches:
            encoded = {
                name: kv.to_device(np.repeat(value.numpy(), options.num_beams, axis=0), self.device)
                for name, value in encoded.items()
            }
        inference = self._constrained(self.decoder(encoded, limit), options)
        return generate_tokens(inference, prompts, options, self.eos, limit, on_token)

    def _constrained(self, decoder: Decoder, options: GenerationOptions) -> Inference:
        """The batch behind the grammar that the options ask for."""
        if not options.constrained:
            return decoder
        from gemini.runtime.constrain import Constrained, Grammar

        return Constrained(decoder, Grammar(self._vocabulary, options))

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        from gemini.runtime.constrain import read_vocabulary

        return read_vocabulary(self.tokenizer, self.model.decoder.vocab_size, self.eos)

    def _starts(self, count: int, options: GenerationOptions) -> list[list[int]]:
        """What the decoder reads before it writes: the model's own tokens, then those asked for."""
        start = list(self.bundle.manifest.generation.decoder_start_ids)
        if options.begin:
            start += self.tokenizer.encode(options.begin, special_tokens=False)
            checked_rows([start], self.model.decoder)
        return [list(start) for _ in range(count)]

    def _feeds(
        self,
        sources: Sequence[Sequence[int]] | NDArray[np.int64] | None,
        pixels: NDArray[np.float32] | None,
    ) -> dict[str, np.ndarray]:
        """The inputs of the encoder's graph; RequestError if the model does not read such sources."""
        if pixels is not None:
            pixels = self._checked_pixels(pixels)
        if not self.takes_text:
            if sources is not None or pixels is None:
                raise RequestError("This model reads images and no text.", "Give an image and no text.")
            return {"pixel_values": pixels}
        if sources is None:
            raise RequestError("There is no text.", "Give a text; beside an image, the one of the task.")
        rows = checked_rows(sources, self.model)
        shape = (len(rows), max(row.size for row in rows))
        ids = np.full(shape, self.model.pad_token_id or 0, np.int64)
        mask = np.zeros(shape, np.int64)
        for row, tokens in enumerate(rows):
            ids[row, : tokens.size] = tokens
            mask[row, : tokens.size] = 1
        feeds: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": mask}
        if self.vision_graph is not None:
            feeds["image_features"] = self._image_features(pixels, len(rows))
        return feeds

    def _image_features(self, pixels: NDArray[np.float32] | None, rows: int) -> NDArray[np.float32]:
        """The vectors (B, N, D) of the images, or (B, 0, D) without any."""
        assert self.vision_graph is not None and self.model.image is not None
        if pixels is None:
            return np.zeros((rows, 0, self.model.image.dim or 0), np.float32)
        if len(pixels) != rows:
            raise RequestError(f"There are {len(pixels)} images and {rows} texts.", "Give one image a text.")
        return run_graph(self.vision_graph, "image_features", {"pixel_values": pixels})

    def _checked_pixels(self, pixel_values: ArrayLike) -> NDArray[np.float32]:
        if self.model.image is None:
            raise RequestError("This model reads no images.", "Give a text only.")
        pixels, image = np.asarray(pixel_values), self.model.image
        expected = (image.channels, image.height, image.width)
        if pixels.ndim != 4 or pixels.shape[1:] != expected or not len(pixels) or pixels.dtype.kind != "f":
            raise RequestError(
                f"pixel_values have shape {pixels.shape} instead of (n, {', '.join(map(str, expected))}).",
                "Preprocess the images with this session.",
            )
        return pixels.astype(np.float32, copy=False)

    def _sources(
        self, text: Any, image: Any
    ) -> tuple[list[list[int]] | None, NDArray[np.float32] | None, bool]:
        """Token ids and pixels of each source, and whether there was just one."""
        if text is None and image is None:
            raise RequestError("There is neither a text nor an image.", "Give at least one of them.")
        texts = list(text) if isinstance(text, (list, tuple)) else None if text is None else [text]
        images = list(image) if isinstance(image, (list, tuple)) else None if image is None else [image]
        single = not isinstance(text, (list, tuple)) and not isinstance(image, (list, tuple))
        if images == [] or texts == []:
            raise RequestError("The list of sources is empty.", "Give at least one text or image.")
        if images is not None and self.model.image is None:
            raise RequestError("This model reads no images.", "Give a text only.")
        if texts is None and self.takes_text:
            prefix = self.bundle.manifest.generation.prefixes.get(CAPTION)
            if prefix is None:
                raise RequestError("The image came without a text.", "Give the text that asks about it.")
            texts = [prefix] * len(images or ())
        elif images is not None and texts is not None and len(texts) == 1 and len(images) > 1:
            texts = texts * len(images)
        if texts is not None and images is not None and len(texts) != len(images):
            raise RequestError(
                f"There are {len(images)} images and {len(texts)} texts.",
                "Give one text an image, or one in all.",
            )
        if texts is not None and not all(isinstance(item, str) for item in texts):
            raise RequestError("The source is neither a text nor a list of texts.", "Give at least one str.")
        sources = None if texts is None else [self.tokenizer.encode(item) for item in texts]
        return sources, None if images is None else self.preprocess(images), single

    def _options(self, given: OptionArgs | Mapping[str, Any]) -> GenerationOptions:
        return make_options(self.bundle.manifest.generation.defaults, given)

    @cached_property
    def _continue_prefix(self) -> list[int]:
        prefix = self.bundle.manifest.generation.prefixes.get(self.bundle.manifest.task)
        return self.tokenizer.encode(prefix, special_tokens=False) if prefix else []

    @cached_property
    def _preprocessing(self) -> Preprocessing:
        return parse_preprocessing(self.bundle.json("preprocessor.json"))


def _both_ends(ids: list[int], longest: int) -> list[int]:
    """``ids``, or as many of the first and of the last as make ``longest``."""
    return ids if len(ids) <= longest else ids[: longest // 2] + ids[longest // 2 - longest :]


class SourceInference:
    """Encoder and decoder as one: a prefill reads sources and the pixels given beforehand, steps answer."""

    def __init__(
        self, session: Seq2SeqGenerator, new_tokens: int, pixel_values: NDArray[np.float32] | None
    ) -> None:
        self._session, self._new_tokens, self._pixels = session, new_tokens, pixel_values
        self._decoder: Decoder | None = None

    def prefill(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Logits (B, V) of the first token of each answer."""
        self.close()
        encoded = self._session.encode(ids if self._session.takes_text else None, self._pixels)
        self._decoder = self._session.decoder(encoded, self._new_tokens)
        start = list(self._session.bundle.manifest.generation.decoder_start_ids)
        return self._decoder.prefill([start for _ in ids])

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append a token to each answer; logits (B, V)."""
        return self._running.step(tokens)

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Let row i go on from what is row ``rows[i]`` now; each row keeps its source."""
        self._running.reorder(rows)

    @property
    def _running(self) -> Decoder:
        if self._decoder is None:
            raise RequestError("A step came before any prefill.", "Call prefill first.")
        return self._decoder

    def close(self) -> None:
        """Free the caches."""
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = None
