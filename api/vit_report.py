"""What static and dynamic int8 make of a Vision Transformer that is trained here, in some minutes.

    python -m gemini.vit_report OUTPUT

It learns the handwritten digits of scikit-learn (the test set of UCI's "Optical Recognition of Handwritten
Digits", CC BY 4.0; 8 x 8 pixels, enlarged by its image processor), from the even half of them; the odd half
is for test. OUTPUT receives the checkpoint, a folder of images to calibrate on and one bundle a recipe; a
checkpoint that lies there is used again. Latencies are of single images, the bundles taking turns. The last
line of standard output is JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from gemini.benchmarks.bench import run_bench
from gemini.pipeline import compress_model
from gemini.runtime import ImageClassifier, load

RECIPES = ("fp32", "int8", "int8-static")
EDGE, PATCH = 64, 8
WIDTH, LAYERS = 384, 4
EPOCHS, BATCH, RATE = 16, 16, 3e-4
# Most steps see this many of the 64 patches (Liu et al., "PatchDropout", arXiv:2208.07220), in a third of the
# time.
PATCHES, WHOLE_EPOCHS = 24, 1
WAVES = 0.3  # of the positions at the start, beside patches of about that size
SHIFT = 5  # pixels that a training image is moved at most
CALIBRATION = 100
ROUNDS = 10


@dataclass(frozen=True)
class Digits:
    """uint8 images (n, 8, 8) and their digits (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def pictures(self) -> list[NDArray[np.uint8]]:
        """The images (8, 8, 3), as an image processor takes them."""
        return list(np.repeat(self.images[..., None], 3, axis=-1))


@dataclass(frozen=True)
class Row:
    """One bundle: percent of the test digits it reads, megabytes, median milliseconds of an image, and how
    many times as fast as the first bundle that is."""

    name: str
    accuracy: float
    size_mb: float
    ms: float
    speed: float


def load_digits() -> tuple[Digits, Digits]:
    """(train, test): the even and the odd half."""
    from sklearn import datasets

    found = datasets.load_digits()
    images = (found.images * (255 / 16)).round().astype(np.uint8)
    return tuple(  # type: ignore[return-value]
        Digits(images[first::2], found.target[first::2].astype(np.int64)) for first in (0, 1)
    )


def train_vit(folder: Path, digits: Digits, progress: bool = True) -> None:
    """Train from random weights, always the same, and leave a Hugging Face checkpoint in ``folder``."""
    torch.manual_seed(0)
    processor = ViTImageProcessorPil(size={"height": EDGE, "width": EDGE})
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        image_size=EDGE,
        patch_size=PATCH,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ViTForImageClassification(config).train()
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = WAVES * waves(EDGE // PATCH, config.hidden_size)
    pixels = torch.from_numpy(np.stack(processor(digits.pictures(), return_tensors="np")["pixel_values"]))
    labels = torch.from_numpy(digits.labels)
    steps = EPOCHS * (len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    bar = tqdm(total=steps, desc="train", unit="step", delay=2, leave=False, disable=not progress)
    for epoch in range(EPOCHS):
        count = PATCHES if epoch < EPOCHS - WHOLE_EPOCHS else None
        for rows in torch.randperm(len(labels)).split(BATCH)[: len(labels) // BATCH]:
            logits = some_patches(model, shifted(pixels[rows]), count)
            loss = nn.functional.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def waves(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, (side * side, width): where to start positions from.

    Beyer et al., "Better plain ViT baselines for ImageNet-1k", arXiv:2205.01580.
    """
    turns = 10_000.0 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * turns
    one = torch.cat((angles.sin(), angles.cos()), 1)
    return torch.cat((one.repeat_interleave(side, 0), one.repeat(side, 1)), 1)


def some_patches(model: ViTForImageClassification, pixels: Tensor, count: int | None) -> Tensor:
    """Logits (B, labels) from the class token and ``count`` patches drawn for the batch; None: all."""
    if count is None:
        return model(pixel_values=pixels).logits
    embedded = model.vit.embeddings(pixels)
    chosen = 1 + torch.randperm(embedded.shape[1] - 1)[:count]
    states = embedded[:, torch.cat((torch.zeros(1, dtype=torch.long), chosen))]
    for layer in model.vit.layers:
        states = layer(states)
    return model.classifier(model.vit.layernorm(states)[:, 0])


def shifted(pixels: Tensor) -> Tensor:
    """The batch (B, C, H, W) moved by one random number of pixels each way, edges repeated."""
    down, right = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
    padded = nn.functional.pad(pixels, (SHIFT,) * 4, mode="replicate")
    return padded[..., down : down + pixels.shape[2], right : right + pixels.shape[3]]


def write_images(folder: Path, images: Sequence[NDArray[np.uint8]]) -> None:
    """One PNG an image."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:03}.png")


def measure(bundles: Mapping[str, Path], digits: Digits, threads: int | None = None) -> list[Row]:
    """Accuracy on all digits, and times of single images with the bundles taking turns."""
    accuracy = {name: right_share(open_classifier(path, threads), digits) for name, path in bundles.items()}
    timed = run_bench(list(bundles.values()), threads=threads, repeat=ROUNDS)["bundles"]
    return [
        Row(
            name,
            round(100 * accuracy[name], 2),
            round(result["size_mb"], 2),
            round(result["latency"]["points"][0]["ms"]["p50"], 3),
            round(result["ratio"]["speed"], 2),
        )
        for name, result in zip(bundles, timed, strict=True)
    ]


def right_share(session: ImageClassifier, digits: Digits) -> float:
    """The share of the digits that are read right."""
    logits = in_batches(session, session.preprocess(digits.pictures()))
    return float((logits.argmax(1) == digits.labels).mean())


def open_classifier(bundle: Path, threads: int | None) -> ImageClassifier:
    """The bundle's session."""
    session = load(bundle, threads=threads)
    assert isinstance(session, ImageClassifier)
    return session


def in_batches(session: ImageClassifier, pixels: NDArray[np.float32], size: int = 32) -> NDArray[np.float32]:
    """Logits (n, labels)."""
    return np.concatenate(
        [session.logits(pixels[start : start + size]) for start in range(0, len(pixels), size)]
    )


def main(arguments: Sequence[str]) -> int:
    """Train unless a checkpoint is there, compress by every recipe, measure, print."""
    if len(arguments) != 1:
        print("usage: python -m gemini.vit_report OUTPUT", file=sys.stderr)
        return 2
    output = Path(arguments[0])
    output.mkdir(parents=True, exist_ok=True)
    train, test = load_digits()
    if not (output / "vit" / "config.json").exists():
        train_vit(output / "vit", train)
    write_images(output / "images", train.pictures()[:CALIBRATION])
    bundles = {}
    for recipe in RECIPES:
        bundles[recipe] = output / recipe
        images = str(output / "images")
        compress_model(str(output / "vit"), bundles[recipe], recipe, calibration=images, force=True)
    rows = measure(bundles, test)
    for row in rows:
        figures = f"{row.accuracy:6.2f} %  {row.size_mb:6.2f} MB  {row.ms:7.2f} ms  {row.speed:5.2f} x"
        print(f"{row.name:12}", figures)
    print(json.dumps({"test_images": len(test.labels), "rows": [asdict(row) for row in rows]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
