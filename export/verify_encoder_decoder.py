"""Compare the graphs of an encoder-decoder with the torch module that they came from.

The chain runs as the runtime runs it: pixels to image vectors, text and image vectors to cross keys and
values, those to logits. Its reference is the model's own forward, which knows nothing of the split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemini.export.encoder_decoder import reads_images_beside_text, reads_text, sample_ids
from gemini.export.forms import Form
from gemini.export.verify import GREEDY, STEPS, TOLERANCE, DecoderRun, Verification, open_graph, verify_greedy
from gemini.model.checkpoint import Checkpoint
from gemini.model.vision import sample_pixels
from gemini.runtime.schema import LayerShape

Feeds = dict[str, np.ndarray]
PREFIX = 5


def verify_encoder_decoder(
    paths: dict[str, Path],
    checkpoint: Checkpoint,
    form: Form,
    layers: list[LayerShape],
    tolerance: float = TOLERANCE,
) -> Verification:
    """Padded and single sources, with and without an image: prefill, decode steps, a chunk, greedy tokens."""
    verification = Verification(str(form), tolerance=tolerance)
    sessions = {name: open_graph(path) for name, path in paths.items()}
    for name, request in _requests(checkpoint.model).items():
        _verify_request(verification, sessions, checkpoint.model, form, layers, name, request)
    return verification


def _requests(model: Any) -> dict[str, Feeds]:
    """What users send, by name: padded texts, a single text, and pixels where the model takes them."""
    if not reads_text(model):
        return {f"{n} images": {"pixel_values": sample_pixels(model, n).numpy()} for n in (3, 1)}
    padded, single = _texts(model, (11, 6, 1)), _texts(model, (8,))
    if not reads_images_beside_text(model):
        return {"padded sources": padded, "one source": single}
    pixels = sample_pixels(model, 3).numpy()
    return {
        "padded sources without image": padded,
        "padded sources with images": padded | {"pixel_values": pixels},
        "one source with an image": single | {"pixel_values": pixels[:1]},
        "one source": single,
    }


def _texts(model: Any, lengths: tuple[int, ...]) -> Feeds:
    ids = sample_ids(model, len(lengths), max(lengths), seed=len(lengths)).numpy()
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _verify_request(
    verification: Verification,
    sessions: dict[str, Any],
    model: Any,
    form: Form,
    layers: list[LayerShape],
    name: str,
    request: Feeds,
) -> None:
    constants = _encoded(sessions, request)
    batch = len(next(iter(request.values())))
    total = PREFIX + STEPS
    ids = sample_ids(model, batch, total, seed=7).numpy()
    expected = _torch_logits(model, request, ids)
    run = DecoderRun(sessions["decoder"], form, layers, batch, total + GREEDY, constants)
    logits = run(ids[:, :PREFIX], [PREFIX] * batch)
    verification.record(f"prefill, {name}", (batch, 0, PREFIX), logits, expected[:, :PREFIX])
    for at in range(PREFIX, total):
        logits = run(ids[:, at : at + 1], [at + 1] * batch)
        verification.record(f"decode, {name}", (batch, at, 1), logits, expected[:, at : at + 1])
    if batch > 1:
        return
    run = DecoderRun(sessions["decoder"], form, layers, 1, total + GREEDY, constants)
    run(ids[:, :1], [1])
    logits = run(ids[:, 1:], [total])
    verification.record(f"chunk, {name}", (1, 1, total - 1), logits, expected[:, 1:])
    verification.greedy_tokens += verify_greedy(
        run,
        lambda tokens: _torch_logits(model, request, tokens[None])[0],
        ids[0],
        logits[0, -1],
        verification.tolerance,
    )


def _encoded(sessions: dict[str, Any], request: Feeds) -> Feeds:
    """What the decoder's graph needs of the encoder's, from the graphs."""
    feeds = dict(request)
    if "vision" in sessions:
        pixels = feeds.pop("pixel_values", None)
        shape = sessions["vision"].get_outputs()[0].shape
        feeds["image_features"] = (
            np.zeros((len(feeds["input_ids"]), 0, shape[2]), np.float32)
            if pixels is None
            else sessions["vision"].run(None, {"pixel_values": pixels})[0]
        )
    encoder = sessions["encoder"]
    names = [output.name for output in encoder.get_outputs()]
    return dict(zip(names, encoder.run(None, feeds), strict=True))


def _torch_logits(model: Any, request: Feeds, ids: np.ndarray) -> np.ndarray:
    feeds = {name: torch.from_numpy(array) for name, array in request.items()}
    with torch.no_grad():
        logits = model(**feeds, decoder_input_ids=torch.from_numpy(ids)).logits
    return np.asarray(logits.float().numpy())
