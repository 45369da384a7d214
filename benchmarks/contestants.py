"""Bundles opened for timing at the level of their graphs, with random inputs of an exact shape.

Tokenizing and sampling are left out, so figures of bundles with different tokenizers compare the models.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemini.benchmarks.latency import Run, random_prompt, time_generation
from gemini.benchmarks.resources import folder_bytes
from gemini.errors import UsageError
from gemini.runtime.bundle import Bundle
from gemini.runtime.checks import check_graph
from gemini.runtime.decoder import Decoder
from gemini.runtime.external_data import external_bytes
from gemini.runtime.schema import DecoderModel, EncoderDecoderModel, EncoderModel
from gemini.runtime.seq2seq import Seq2SeqGenerator
from gemini.runtime.session import open_graph, run_graph
from gemini.runtime.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Contestant:
    """An opened bundle: ``generate`` for decoders, ``call`` for encoders and image models."""

    bundle: Bundle
    threads: int
    device: str
    generate: Callable[[], Run] | None = None
    call: Callable[[], object] | None = None


def check_length(bundle: Bundle, prompt_tokens: int, new_tokens: int) -> None:
    """UsageError unless so many tokens fit the model's context."""
    model = bundle.manifest.model
    if isinstance(model, DecoderModel):
        prompt_tokens += new_tokens
    elif isinstance(model, EncoderDecoderModel):
        prompt_tokens = max(prompt_tokens if model.vocab_size else 0, new_tokens + 2)  # start and first token
    elif not isinstance(model, EncoderModel):
        return
    if prompt_tokens > model.context_length:
        raise UsageError(
            f"{prompt_tokens} tokens exceed the context of {bundle.manifest.name} ({model.context_length}).",
            "Ask for fewer tokens.",
        )


def open_contestant(
    bundle: Bundle, prompt_tokens: int, new_tokens: int, threads: int | None, device: str, stack: ExitStack
) -> Contestant:
    """Load the bundle's graph and prepare its input; the stack frees its buffers when it closes."""
    model = bundle.manifest.model
    if isinstance(model, DecoderModel):
        return _open_decoder(bundle, model, prompt_tokens, new_tokens, threads, device, stack)
    if isinstance(model, EncoderDecoderModel):
        return _open_pair(bundle, model, prompt_tokens, new_tokens, threads, device, stack)
    graph = open_graph(bundle, bundle.manifest.family, device, threads)
    if isinstance(model, EncoderModel):
        feeds: dict[str, NDArray[Any]] = _encoder_feeds(model, prompt_tokens)
    else:
        shape = (1, model.channels, model.height, model.width)
        feeds = {"pixel_values": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    output = next(iter(graph.outputs))
    call = partial(run_graph, graph, output, feeds)
    return Contestant(bundle, graph.threads, graph.device, call=call)


def _open_decoder(
    bundle: Bundle,
    model: DecoderModel,
    prompt_tokens: int,
    new_tokens: int,
    threads: int | None,
    device: str,
    stack: ExitStack,
) -> Contestant:
    graph = open_graph(bundle, "decoder", device, threads)
    check_graph(graph, model)
    decoder = Decoder(graph, model, new_tokens)
    stack.callback(decoder.close)
    prompt = random_prompt(prompt_tokens, model.vocab_size)
    return Contestant(
        bundle, graph.threads, graph.device, generate=partial(time_generation, decoder, prompt, new_tokens)
    )


def _open_pair(
    bundle: Bundle,
    model: EncoderDecoderModel,
    prompt_tokens: int,
    new_tokens: int,
    threads: int | None,
    device: str,
    stack: ExitStack,
) -> Contestant:
    """The prompt goes through the encoder, which the time to the first token therefore holds."""
    graphs = {name: open_graph(bundle, name, device, threads) for name in bundle.manifest.graphs}
    session = Seq2SeqGenerator(bundle, graphs, TextTokenizer.read(bundle))
    pixels = None
    if model.vocab_size is None and model.image is not None:
        shape = (1, model.image.channels, model.image.height, model.image.width)
        pixels = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    inference = session.inference(new_tokens, pixels)
    stack.callback(inference.close)
    prompt = random_prompt(prompt_tokens, model.vocab_size or model.decoder.vocab_size)
    generate = partial(time_generation, inference, prompt, new_tokens)
    return Contestant(bundle, session.threads, session.device, generate=generate)


def _encoder_feeds(model: EncoderModel, tokens: int) -> dict[str, NDArray[Any]]:
    ids = random_prompt(tokens, model.vocab_size)
    fill = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: fill[name] for name in model.inputs}


def bytes_per_token(bundle: Bundle) -> int:
    """Weight bytes that one decoding step reads: all of the decoder graph's data.

    Exact where the embedding is tied to the head, which reads it whole; an upper bound where it is not.
    """
    graph = bundle.graph(bundle.manifest.graphs["decoder"])
    return external_bytes(graph.read_bytes()) or folder_bytes(graph)
