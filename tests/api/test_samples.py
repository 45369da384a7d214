"""Images to calibrate on: the pixels that the model will get, and what is no folder of images."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from gemini.benchmarks.text import TextSource
from gemini.calibration import calibration_windows
from gemini.errors import UsageError
from gemini.samples import image_windows


def vision(size: int = 16) -> SimpleNamespace:
    processor = ViTImageProcessorPil(size={"height": size, "width": size})
    return SimpleNamespace(family="vision", processor=processor, tokenizer=None)


def test_the_images_of_a_folder_become_the_processors_pixels(tmp_path):
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (9 + i, 20, 3), dtype=np.uint8) for i in range(10)]
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{index:02}.png")
    (tmp_path / ".hidden").write_text("no image")
    checkpoint = vision()
    windows, count = image_windows(checkpoint, tmp_path)
    assert count == 10 and [len(window["pixel_values"]) for window in windows] == [8, 2]
    expected = checkpoint.processor(pictures, return_tensors="np")["pixel_values"]
    found = np.concatenate([window["pixel_values"].numpy() for window in windows])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert calibration_windows(checkpoint, tmp_path)[1] == {"name": tmp_path.name, "images": 10}


def test_what_the_model_does_not_read_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no images"):
        calibration_windows(vision(), tmp_path)
    with pytest.raises(UsageError, match="folder of images"):
        calibration_windows(vision(), TextSource("a.txt", "text"))
    with pytest.raises(UsageError, match="is a folder"):
        calibration_windows(SimpleNamespace(family="encoder"), tmp_path)
    assert calibration_windows(vision()) == ([], {})
