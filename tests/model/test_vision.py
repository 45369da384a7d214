"""The reduced image plan against transformers' own processor, and processors that cannot be reduced."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from gemini.errors import CheckpointError
from gemini.model import load_checkpoint
from gemini.model.vision import _apply, normalized_preprocessor, output_size


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


def test_vit_plan_has_the_contracts_keys() -> None:
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 48})
    plan = normalized_preprocessor(processor)
    assert plan == {
        "resize": {"height": 32, "width": 48},
        "resample": 2,
        "center_crop": None,
        "rescale": pytest.approx(1 / 255),
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "rgb": True,
    }
    assert output_size(plan) == (32, 48)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTImageProcessor", {"size": {"height": 24, "width": 24}, "do_normalize": False}),
        (
            "ViTImageProcessor",
            {"size": {"height": 24, "width": 24}, "do_rescale": False, "do_normalize": False},
        ),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    ],
)
def test_plan_gives_the_processors_pixels(name: str, options: dict[str, Any]) -> None:
    processor = getattr(transformers, name)(**options)
    plan = normalized_preprocessor(processor)
    pixels = np.random.default_rng(3).integers(0, 256, (120, 75, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = processor(images=image, return_tensors="np")["pixel_values"][0]
    # float32 rounding of (x * scale - mean) / std; one step of 255 more or less would show as 4e-3 and more.
    np.testing.assert_allclose(_apply(plan, image), expected, rtol=0, atol=1e-5)


def test_size_that_is_not_fixed_is_refused() -> None:
    processor = transformers.ViTImageProcessor(size={"height": 24, "width": 24}, do_resize=False)
    with pytest.raises(CheckpointError, match="no fixed size"):
        normalized_preprocessor(processor)


def test_processor_that_does_more_is_refused() -> None:
    class Inverting:
        size, do_resize, resample = {"height": 8, "width": 8}, True, 2

        def __call__(self, images: Image.Image, return_tensors: str) -> dict[str, Any]:
            small = np.asarray(images.resize((8, 8), resample=2), np.float32)
            return {"pixel_values": (255 - small).transpose(2, 0, 1)[None]}

    with pytest.raises(CheckpointError, match="Inverting does more than"):
        normalized_preprocessor(Inverting())


def test_missing_processor_is_refused(vit: Path) -> None:
    (vit / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no image processor"):
        load_checkpoint(vit)


@pytest.mark.parametrize("text", ["{", '{"image_processor_type": "NoSuch"}', "[]"])
def test_unreadable_processor_is_refused(vit: Path, text: str) -> None:
    (vit / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="image processor"):
        load_checkpoint(vit)


def test_processor_of_another_size_is_refused(vit: Path, edit_json: Callable[..., None]) -> None:
    edit_json(vit / "preprocessor_config.json", size={"height": 64, "width": 64})
    with pytest.raises(CheckpointError, match="does not take the 64x64"):
        load_checkpoint(vit)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": 0.5},
        {"image_std": ["x", 1, 1]},
        {"image_std": [1.0]},
        {"resample": "nearest"},
        {"size": "big"},
        {"size": {"height": 10**9, "width": 10**9}},
        {"rescale_factor": {}},
    ],
    ids=str,
)
def test_damaged_processor_values_are_refused(
    vit: Path, edit_json: Callable[..., None], changes: dict[str, Any]
) -> None:
    edit_json(vit / "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match="image processor"):
        load_checkpoint(vit)
