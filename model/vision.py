"""Image processors: loading one without torchvision, and reducing it to the steps the runtime knows."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemini.errors import CheckpointError
from gemini.model.offline import first_line, import_transformers

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# uint8 pixels rescaled and divided by a deviation of about 0.2: one step in 255 of difference would be 0.02,
# float32 rounding is about 1e-6.
_TOLERANCE = 1e-4
# Far above what any image encoder takes; a damaged size must not allocate gigabytes.
_MAX_EDGE = 4096


def pixel_shape(model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the pixels that a model was built for."""
    config = model.config
    for part in ("encoder", "vision_config"):  # beside a text decoder, or a text encoder
        if getattr(config, "image_size", None) is None:
            config = getattr(config, part, config)
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def sample_pixels(model: Any, batch: int = 2) -> "torch.Tensor":
    """Random pixels float32 (batch, channels, height, width) that the model takes, always the same."""
    import torch

    return torch.randn(batch, *pixel_shape(model), generator=torch.Generator().manual_seed(0))


def load_processor(folder: Path) -> Any:
    """Load the image processor of a checkpoint with transformers' PIL backend (torchvision is not needed).

    Raises:
        CheckpointError: the folder has none, or transformers cannot read it.
    """
    transformers = import_transformers()
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise CheckpointError(
            "The checkpoint has no image processor (preprocessor_config.json).",
            "Save it into the folder with `processor.save_pretrained(folder)`.",
        )
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            str(folder), backend="pil", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # any type: the file's values are used all over the processor's constructor
        raise CheckpointError(
            f"The image processor cannot be read: {first_line(error)}.",
            "Save preprocessor_config.json again.",
        ) from error


def normalized_preprocessor(processor: Any) -> dict[str, Any]:
    """The processor as the bundle's ``preprocessor.json``, checked against the processor itself.

    Returns:
        ``resize`` {"height", "width"} or {"shortest_edge"} or None, ``resample`` (PIL filter number),
        ``center_crop`` {"height", "width"} or None, ``rescale`` factor or None, ``mean`` and ``std`` (lists
        of 3) or None, ``rgb`` (convert the image to RGB first). Applied in this order they give float32
        ``pixel_values`` (3, height, width).

    Raises:
        CheckpointError: the processor does something else, or its output has no fixed size.
    """
    try:
        plan = _read_plan(processor)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"The image processor holds a value of a wrong type: {first_line(error)}.",
            "Save preprocessor_config.json again.",
        ) from error
    _check_plan(processor, plan)
    return plan


def _read_plan(processor: Any) -> dict[str, Any]:
    normalize = bool(getattr(processor, "do_normalize", False))
    plan: dict[str, Any] = {
        "resize": _size(processor.size, edges=True) if getattr(processor, "do_resize", False) else None,
        "resample": int(getattr(processor, "resample", None) or 0),
        "center_crop": _size(processor.crop_size) if getattr(processor, "do_center_crop", False) else None,
        "rescale": float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else None,
        "mean": [float(value) for value in processor.image_mean] if normalize else None,
        "std": [float(value) for value in processor.image_std] if normalize else None,
        "rgb": True,
    }
    if plan["resize"] is not None and getattr(processor, "crop_pct", None):
        plan = _with_crop_fraction(plan, float(processor.crop_pct))
    return plan


def output_size(plan: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of the pixels that a plan of ``normalized_preprocessor`` produces."""
    fixed = plan["center_crop"] or plan["resize"]
    return fixed["height"], fixed["width"]


def _size(size: Any, edges: bool = False) -> dict[str, int]:
    given = {
        key: int(size[key]) for key in ("height", "width", "shortest_edge", "longest_edge") if size.get(key)
    }
    if max(given.values(), default=0) > _MAX_EDGE:
        raise CheckpointError(
            f"The image processor makes images of {max(given.values())} pixels; the limit is {_MAX_EDGE}.",
            "Set height and width in preprocessor_config.json.",
        )
    if set(given) == {"height", "width"} or (edges and set(given) == {"shortest_edge"}):
        return given
    raise CheckpointError(
        f"The image processor sizes images by {dict(size)}, which is not a fixed size.",
        "Set height and width in preprocessor_config.json.",
    )


def _with_crop_fraction(plan: dict[str, Any], fraction: float) -> dict[str, Any]:
    """Below 384 pixels, processors with ``crop_pct`` resize to edge / fraction and cut the middle out."""
    edge = plan["resize"].get("shortest_edge")
    if edge is None:
        return plan
    square = {"height": edge, "width": edge}
    if edge >= 384:
        return {**plan, "resize": square}
    return {**plan, "resize": {"shortest_edge": int(edge / fraction)}, "center_crop": square}


def _check_plan(processor: Any, plan: dict[str, Any]) -> None:
    """Compare the plan with the processor on a wide and a tall random image."""
    from PIL import Image

    random = np.random.default_rng(0)
    for height, width in ((97, 181), (203, 89)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        try:
            expected = np.asarray(processor(images=image, return_tensors="np")["pixel_values"])[0]
            actual = _apply(plan, image)
        except CheckpointError:
            raise
        except Exception as error:  # any type: sizes and means from the file reach PIL and numpy unchecked
            raise CheckpointError(
                f"The image processor fails on a plain image: {first_line(error)}.",
                "Check the values in preprocessor_config.json.",
            ) from error
        if expected.shape != actual.shape or np.abs(expected - actual).max() > _TOLERANCE:
            raise CheckpointError(
                f"{type(processor).__name__} does more than resize, centre crop, rescale and normalize.",
                "Use a checkpoint with a plain image processor.",
            )


def _apply(plan: dict[str, Any], image: "Image") -> "NDArray[np.float32]":
    """The plan in its simplest form; (3, height, width) float32."""
    if plan["resize"] is not None:
        image = image.resize(_target(image.size, plan["resize"]), resample=plan["resample"])
    if plan["center_crop"] is not None:
        height, width = plan["center_crop"]["height"], plan["center_crop"]["width"]
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    elif plan["resize"] is None or "height" not in plan["resize"]:
        raise CheckpointError(
            "The image processor gives images of no fixed size.",
            "Set height and width in preprocessor_config.json.",
        )
    pixels = np.asarray(image, dtype=np.float32)
    if plan["rescale"] is not None:
        pixels = pixels * np.float32(plan["rescale"])
    if plan["mean"] is not None:
        mean, std = np.asarray(plan["mean"], np.float32), np.asarray(plan["std"], np.float32)
        pixels = ((pixels - mean) / std).astype(np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)


def _target(size: tuple[int, int], resize: dict[str, int]) -> tuple[int, int]:
    """(width, height) after the resize; the longer edge keeps the ratio, rounded down."""
    if "height" in resize:
        return resize["width"], resize["height"]
    width, height = size
    short, edge = min(width, height), resize["shortest_edge"]
    return (edge if width == short else int(edge * width / short)), (
        edge if height == short else int(edge * height / short)
    )
