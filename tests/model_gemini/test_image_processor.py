"""The image processor: the same pixels as the torch-free runtime makes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from gemini.model.gemini import GeminiImageProcessor
from gemini.model.vision import load_processor, normalized_preprocessor
from gemini.runtime.vision import parse_preprocessing, preprocess_image


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("size", [(64, 64), (97, 181), (200, 33)])
def test_runtime_makes_the_same_pixels(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    GeminiImageProcessor().save_pretrained(tmp_path)
    processor = load_processor(tmp_path)
    assert type(processor) is GeminiImageProcessor
    expected = processor(images=image, return_tensors="np")["pixel_values"][0]
    actual = preprocess_image(image, parse_preprocessing(normalized_preprocessor(processor)))
    assert expected.shape == actual.shape == (3, 64, 64)
    # float32 rounding; a step of one in 255 would be 0.008.
    np.testing.assert_allclose(actual, expected, atol=1e-6, rtol=0)


def test_transparent_is_white_and_values_span_one() -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:32, :, 3] = 255  # the upper half is black, the lower transparent
    values = GeminiImageProcessor()(images=Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    assert (values[:, :32] == -1).all()
    assert (values[:, 32:] == 1).all()


def test_auto_class_finds_it_without_torchvision(tmp_path: Path) -> None:
    GeminiImageProcessor().save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is GeminiImageProcessor
