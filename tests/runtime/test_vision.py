"""Image preprocessing against transformers' PIL processors, and image classification with a toy graph."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from gemini.errors import BundleError, RequestError
from gemini.runtime import ImageClassifier, load
from gemini.runtime.vision import open_image, parse_preprocessing, preprocess_image


def picture(width, height, mode="RGB", seed=0):
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    data = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(data.squeeze(), mode=None).resize((width, height), 2)


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def document(**changes):
    steps = {
        "resize": None,
        "resample": 2,
        "center_crop": None,
        "rescale": 1 / 255,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "rgb": True,
    }
    return {**steps, **changes}


SIZES = [(50, 37), (37, 50), (16, 16), (300, 20), (9, 7)]
STEPS = [
    {"resize": {"height": 24, "width": 32}},
    {"resize": {"height": 24, "width": 24}, "resample": 3},
    {"resize": {"shortest_edge": 25}, "center_crop": {"height": 21, "width": 20}},
    {"center_crop": {"height": 33, "width": 40}},
    {"resize": {"shortest_edge": 17}, "resample": 0, "mean": None, "std": None},
    {"rescale": None, "mean": [127.0] * 3, "std": [60.0, 70.0, 80.0]},
]


@pytest.mark.parametrize("steps", STEPS)
def test_preprocessing_equals_transformers(steps):
    backends = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    ours = parse_preprocessing(document(**steps))
    full = document(**steps)
    theirs = backends.ViTImageProcessorPil(
        do_resize=full["resize"] is not None,
        size=full["resize"],
        resample=full["resample"],
        do_center_crop=full["center_crop"] is not None,
        crop_size=full["center_crop"],
        do_rescale=full["rescale"] is not None,
        rescale_factor=full["rescale"],
        do_normalize=full["mean"] is not None,
        image_mean=full["mean"],
        image_std=full["std"],
        do_convert_rgb=True,
    )
    for seed, (width, height) in enumerate(SIZES):
        image = picture(width, height, ("RGB", "RGBA", "L")[seed % 3], seed)
        expected = theirs(image, return_tensors="np")["pixel_values"][0]
        # float32 arithmetic on their side, of values up to about 3.
        np.testing.assert_allclose(preprocess_image(image, ours), expected, atol=1e-5)


def test_classes_of_images_from_all_sources(new_vision, tmp_path):
    toy = new_vision()
    session = load(toy.path, threads=1)
    assert isinstance(session, ImageClassifier)
    image = picture(40, 30)
    (tmp_path / "a.png").write_bytes(encoded(image))
    pixels = session.preprocess([image])
    assert pixels.shape == (1, 3, 12, 16) and pixels.dtype == np.float32
    logits = toy.reference(pixels)
    np.testing.assert_allclose(session.logits(pixels), logits, atol=1e-5)
    expected = np.exp(logits[0]) / np.exp(logits[0]).sum()
    sources = [image, np.asarray(image), encoded(image), tmp_path / "a.png", str(tmp_path / "a.png")]
    results = session.classify(sources, batch_size=2)
    assert len(results) == 5 and all(result == results[0] for result in results[1:4])
    assert [label.label for label in results[0]] == ["abcd"[i] for i in np.argsort(-expected)]
    np.testing.assert_allclose([label.score for label in results[0]], np.sort(expected)[::-1], atol=1e-5)


def test_the_orientation_tag_of_a_camera_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    assert open_image(encoded(picture(30, 20), "JPEG", exif=exif)).size == (20, 30)


def png_header(width, height):
    """A PNG of some bytes that claims any number of pixels."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    data = zlib.compress(b"\0" * 100)
    idat = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return head + idat + b"\0\0\0\0IEND\xaeB`\x82"


@pytest.mark.parametrize("size", [(9000, 9000), (13000, 13000), (60000, 60000), (1 << 30, 1 << 30)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(size):
    with pytest.raises(RequestError):
        open_image(png_header(*size))


def test_damaged_images_are_request_errors(tmp_path):
    good = encoded(picture(40, 30))
    rng = np.random.default_rng(1)
    for data in (b"", b"not an image", good[:40], good[: len(good) // 2], b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        with pytest.raises(RequestError):
            open_image(data)
    for trial in range(200):
        broken = bytearray(good if trial % 2 else encoded(picture(40, 30), "JPEG"))
        broken[rng.integers(len(broken))] ^= int(rng.integers(1, 256))
        with contextlib.suppress(RequestError):
            open_image(bytes(broken))
    with pytest.raises(RequestError, match="no image at"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(RequestError):
        open_image(tmp_path)


@pytest.mark.parametrize(
    "source", [None, 5, {"a": 1}, "a\0b", np.zeros((2, 2, 7), np.uint8), np.array(["x"])]
)
def test_what_is_no_image_is_refused(source):
    with pytest.raises(RequestError):
        open_image(source)


@pytest.mark.parametrize("images", [[], "a.png", b"x", None, 5])
def test_what_is_no_list_of_images_is_refused(new_vision, images):
    session = load(new_vision().path, threads=1)
    with pytest.raises(RequestError):
        session.classify(images)
    with pytest.raises(RequestError):
        session.preprocess(images)


@pytest.mark.parametrize("shape", [(3, 12, 16), (1, 3, 16, 12), (0, 3, 12, 16), (1, 1, 12, 16)])
def test_pixel_values_of_another_shape_are_refused(new_vision, shape):
    with pytest.raises(RequestError, match="pixel_values"):
        load(new_vision().path, threads=1).logits(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    "change",
    [
        {"resize": {"height": 0, "width": 3}},
        {"resize": 5},
        {"resample": 99},
        {"rescale": "x"},
        {"mean": [0.5, "a", 1]},
        {"center_crop": {"height": 4}},
    ],
)
def test_a_malformed_preprocessor_is_refused(new_vision, change):
    with pytest.raises(BundleError, match=r"preprocessor\.json"):
        load(new_vision(**change).path)


def test_means_that_do_not_fit_the_channels_are_refused(new_vision):
    session = load(new_vision(mean=[0.5], std=[0.5]).path, threads=1)
    with pytest.raises(BundleError, match="channels"):
        session.preprocess([picture(8, 8)])
