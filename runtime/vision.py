"""Image classification: preprocessing as transformers' PIL processors do it, then the graph.

    load("vit/").classify(["cat.jpg"])      # [[Label("tabby", 0.93), …]]

Pillow is imported only when an image is opened.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemini.errors import RequestError
from gemini.runtime.bundle import Bundle
from gemini.runtime.encoder import Label, ranked, scores
from gemini.runtime.fields import Fields, damaged
from gemini.runtime.schema import VisionModel
from gemini.runtime.session import Graph, require, run_graph

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000  # a small file can claim a picture of terabytes
# Formats whose decoders read pixels and nothing else: no PostScript, no containers that open further files.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
BATCH = 8


@dataclass(frozen=True)
class Preprocessing:
    """The steps of preprocessor.json in their order; None skips a step. Sizes are (height, width)."""

    resize: tuple[int, int] | None
    shortest_edge: int | None
    resample: int
    center_crop: tuple[int, int] | None
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    rgb: bool


class ImageClassifier:
    """A session for image classification."""

    def __init__(self, bundle: Bundle, graph: Graph) -> None:
        model = bundle.manifest.model
        if not isinstance(model, VisionModel):
            raise damaged("the manifest describes no image model")
        require(graph, ["pixel_values"], ["logits"])
        self.bundle, self.graph, self.model, self.labels = bundle, graph, model, model.labels
        self.device, self.threads = graph.device, graph.threads
        self.preprocessing = parse_preprocessing(bundle.json("preprocessor.json"))

    def preprocess(self, images: Sequence[Any]) -> NDArray[np.float32]:
        """pixel_values float32 (n, C, H, W) from paths, bytes, PIL images or uint8 arrays (H, W, 3)."""
        if isinstance(images, (str, bytes, Path)) or not isinstance(images, (Sequence, np.ndarray)):
            raise RequestError("The input is not a list of images.", "Give a list of paths or images.")
        if len(images) == 0:
            raise RequestError("The list of images is empty.", "Give at least one image.")
        return preprocess_images(images, self.preprocessing)

    def logits(self, pixel_values: ArrayLike) -> NDArray[np.float32]:
        """Logits float32 (n, labels) from pixel_values float32 (n, C, H, W)."""
        pixels = np.asarray(pixel_values)
        expected = (self.model.channels, self.model.height, self.model.width)
        if (
            pixels.ndim != 4
            or pixels.shape[1:] != expected
            or pixels.shape[0] == 0
            or pixels.dtype.kind != "f"
        ):
            raise RequestError(
                f"pixel_values have shape {pixels.shape} instead of (n, {', '.join(map(str, expected))}).",
                "Preprocess the images with this session.",
            )
        return run_graph(self.graph, "logits", {"pixel_values": pixels.astype(np.float32, copy=False)})

    def classify(self, images: Sequence[Any], batch_size: int = BATCH) -> list[list[Label]]:
        """All labels of each image with their probabilities, best first."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise RequestError(f"The batch size {batch_size!r} is not a positive integer.", "Use 1 or more.")
        if not isinstance(images, Sequence) or isinstance(images, (str, bytes)) or not images:
            raise RequestError("The input is not a list of images.", "Give a list with at least one image.")
        results: list[list[Label]] = []
        for start in range(0, len(images), batch_size):
            logits = self.logits(self.preprocess(images[start : start + batch_size]))
            results += ranked(scores(logits, None), self.labels)
        return results


def parse_preprocessing(document: Any) -> Preprocessing:
    """Check preprocessor.json; BundleError if it is not what the exporter writes."""
    fields = Fields(document, "preprocessor.json")
    resize = fields.section("resize") if fields.has("resize") else None
    edge = resize.integer("shortest_edge", 1, 1 << 15) if resize and resize.has("shortest_edge") else None
    return Preprocessing(
        resize=_size(resize) if resize and edge is None else None,
        shortest_edge=edge,
        resample=fields.integer("resample", 0, 5) if fields.has("resample") else 2,
        center_crop=_size(fields.section("center_crop")) if fields.has("center_crop") else None,
        rescale=fields.number("rescale") if fields.has("rescale") else None,
        mean=fields.numbers("mean") if fields.has("mean") else None,
        std=fields.numbers("std") if fields.has("std") else None,
        rgb=fields.values.get("rgb", True) is not False,
    )


def open_image(image: Any) -> Image:
    """A decoded PIL image from a path, bytes, a PIL image or a uint8 array; RequestError if it is not one."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise RequestError(
            "Images need Pillow, which is not installed.", "Run pip install pillow."
        ) from error
    if isinstance(image, Image.Image):
        return _within_limit(image)
    try:
        if isinstance(image, np.ndarray):
            return _within_limit(Image.fromarray(image))
        source = io.BytesIO(image) if isinstance(image, bytes) else Path(image)
        with Image.open(source, formats=_FORMATS) as opened:
            _within_limit(opened)  # before any pixel is decoded
            opened.load()
            return ImageOps.exif_transpose(opened)
    except RequestError:
        raise
    except FileNotFoundError as error:
        raise RequestError(f"There is no image at {str(image)!r}.", "Check the path.") from error
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, …
        raise RequestError(
            f"The image cannot be decoded ({type(error).__name__}).",
            f"Give a valid {', '.join(_FORMATS)} file.",
        ) from error


def preprocess_images(images: Sequence[Any], steps: Preprocessing) -> NDArray[np.float32]:
    """float32 (n, C, H, W) from paths, bytes, PIL images or uint8 arrays (H, W, 3)."""
    return np.stack([preprocess_image(open_image(image), steps) for image in images])


def preprocess_image(image: Image, steps: Preprocessing) -> NDArray[np.float32]:
    """float32 (C, H, W): resize, centre crop, rescale, normalise, each as ``steps`` says."""
    if steps.rgb and image.mode != "RGB":
        image = to_rgb(image)
    target = steps.resize
    if steps.shortest_edge is not None:
        target = edge_size(image.height, image.width, steps.shortest_edge)
    if target is not None:
        if target[0] * target[1] > MAX_PIXELS:
            raise RequestError("The image is too long and thin to be resized.", "Crop it first.")
        image = image.resize((target[1], target[0]), resample=steps.resample)
    pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if steps.center_crop is not None:
        pixels = center_crop(pixels, *steps.center_crop)
    # float64 until the end, so that the order of roundings does not matter.
    values = pixels.astype(np.float64) * (1.0 if steps.rescale is None else steps.rescale)
    if steps.mean is not None and steps.std is not None:
        if not len(steps.mean) == len(steps.std) == len(values) or 0.0 in steps.std:
            raise damaged("preprocessor.json: mean and std do not fit the channels")
        values = (values - np.array(steps.mean)[:, None, None]) / np.array(steps.std)[:, None, None]
    return np.ascontiguousarray(values, dtype=np.float32)


def to_rgb(image: Image) -> Image:
    """The image in three channels; what is transparent becomes white, as in transformers."""
    from PIL import Image as pillow

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def edge_size(height: int, width: int, edge: int) -> tuple[int, int]:
    """(height, width) with the shorter side at ``edge`` and the proportions kept, rounded down."""
    if height < width:
        return edge, int(edge * width / height)
    return int(edge * height / width), edge


def center_crop(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The middle (C, height, width) of (C, H, W); zeros where the image is smaller."""
    grown_height, grown_width = max(height, pixels.shape[1]), max(width, pixels.shape[2])
    if (grown_height, grown_width) != pixels.shape[1:]:
        canvas = np.zeros((pixels.shape[0], grown_height, grown_width), pixels.dtype)
        # Rounded up: an odd margin puts the extra row on top and left.
        top = (grown_height - pixels.shape[1] + 1) // 2
        left = (grown_width - pixels.shape[2] + 1) // 2
        canvas[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
        pixels = canvas
    top, left = (grown_height - height) // 2, (grown_width - width) // 2
    return pixels[:, top : top + height, left : left + width]


def _within_limit(image: Image) -> Image:
    if image.width * image.height > MAX_PIXELS or image.width * image.height == 0:
        raise RequestError(
            f"The image has {image.width} x {image.height} pixels.", f"Use 1 to {MAX_PIXELS} pixels."
        )
    return image


def _size(fields: Fields) -> tuple[int, int]:
    return fields.integer("height", 1, 1 << 15), fields.integer("width", 1, 1 << 15)
