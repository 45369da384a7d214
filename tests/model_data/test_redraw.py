"""Redrawn drawings: still the same thing, never the same picture, the same file every time."""

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from gemini.model.data import load_drawings, redraw
from gemini.model.data.drawings import render

HEAD = '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64" viewBox="0 0 32 32">'
FACE = (
    '<circle cx="16" cy="16" r="14" fill="#ffcc4d"/><circle cx="11" cy="12" r="2" fill="#664500"/>'
    '<circle cx="21" cy="12" r="2" fill="#664500"/><path d="M10 20h12v3H10z" fill="#664500"/>'
)
SHADED = (
    '<defs><linearGradient id="a"><stop offset="0" stop-color="#f00"/><stop offset="1" stop-color="#00f"/>'
    '</linearGradient></defs><path d="M0 0h32v32H0z" fill="url(#a)"/>'
)


def document(body: str) -> str:
    return f"{HEAD}{body}</svg>"


def root_of(body: str) -> ElementTree.Element:
    return ElementTree.fromstring(document(body))


def test_redrawn_pictures_differ_but_stay_near() -> None:
    original = render(document(FACE)).astype(float)
    generator = np.random.default_rng(0)
    pictures = [render(redraw.redraw(document(FACE), generator)).astype(float) for _ in range(40)]
    assert len({picture.tobytes() for picture in pictures}) == 40
    alphas = np.stack([picture[..., 3] / 255 for picture in pictures])
    overlap = np.minimum(alphas, original[..., 3] / 255).sum((1, 2)) / np.maximum(
        alphas, original[..., 3] / 255
    ).sum((1, 2))
    assert np.median(overlap) > 0.85 and overlap.min() > 0.6
    colours = np.stack([picture[48, 32, :3] for picture in pictures])  # of the cheek, yellow
    assert np.all(np.median(colours, axis=0)[:2] > 150) and np.median(colours[:, 2]) < 120


def test_a_seed_says_what_is_drawn() -> None:
    first, again, other = (redraw.redraw(document(FACE), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_flattening_leaves_the_mean_of_the_stops() -> None:
    root = root_of(SHADED)
    redraw._flatten(root)
    stops = [element.get("stop-color") for element in root.iter() if redraw._tag(element) == "stop"]
    assert stops == ["#800080", "#800080"]
    pixels = render(ElementTree.tostring(root, encoding="unicode"))
    assert np.ptp(pixels[..., 0].astype(int)) == 0


def test_one_colour_stays_one_colour_and_references_stay() -> None:
    root = root_of(FACE + SHADED)
    redraw._recolour(root, np.random.default_rng(0))
    fills = [element.get("fill") for element in root if element.get("fill")]
    assert fills[1] == fills[2] == fills[3] != "#664500" and fills[0] != "#ffcc4d"
    assert fills[-1] == "url(#a)"


@pytest.mark.parametrize("colour", ["#ff0000", "#00ff00", "#123456", "#808080", "#000", "#fff"])
def test_a_colour_shifts_within_its_bounds(colour: str) -> None:
    import colorsys

    old = redraw._rgb(colour)
    assert old is not None
    for seed in range(50):
        new = redraw._rgb(redraw._shifted(old, np.random.default_rng(seed).normal(0, 1, 3)))
        before, after = colorsys.rgb_to_hsv(*old), colorsys.rgb_to_hsv(*new)
        assert abs(after[2] - before[2]) <= 0.2 + 0.5 / 255
        if min(before[1], after[1]) > 0.2 and after[2] > 0.2:
            turned = abs(after[0] - before[0])
            assert min(turned, 1 - turned) < 0.042 + 0.01  # and 8 bits a channel


def test_lights_go_and_the_rest_stays() -> None:
    root = root_of(FACE + '<circle cx="9" cy="9" r="3" fill="#fff" opacity=".4"/>')
    kept = redraw._simplify(list(redraw._shapes(root)))
    assert len(kept) == len(root) == 4


def test_what_is_not_drawn_is_not_moved() -> None:
    hidden = '<clipPath id="c"><path d="M0 0h9v9H0z"/></clipPath><g clip-path="url(#c)">' + FACE + "</g>"
    for seed in range(10):
        moved = ElementTree.fromstring(redraw.redraw(document(hidden), np.random.default_rng(seed)))
        clip = next(element for element in moved.iter() if redraw._tag(element) == "clipPath")
        assert "transform" not in clip[0].attrib and "stroke" not in clip[0].attrib
        assert all("transform" in shape.attrib for _, shape in redraw._shapes(moved))


def test_outlines_are_around_filled_shapes() -> None:
    root = root_of(FACE + '<path d="M0 0h9" fill="none" stroke="#f00"/>')
    shapes = list(redraw._shapes(root))
    redraw._outline(shapes, 1.5, np.random.default_rng(0))
    lines = [shape.get("stroke") for _, shape in shapes]
    assert len({*lines[:4]}) == 1 and max(redraw._rgb(lines[0])) < 0.55 and lines[4] == "#f00"
    assert re.fullmatch(r"1\.500", shapes[0][1].get("stroke-width"))


def test_the_file_is_made_once_for_the_documents_it_came_from(
    tmp_path: Path, build: Callable[[Path], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)
    drawings = load_drawings(tmp_path, "train")
    pixels = redraw.ensure_redrawn(tmp_path, "train", 3)
    assert pixels.shape == (len(drawings), 3, 64, 64, 4) and pixels.dtype == np.uint8
    # A rectangle moved a little covers most of what it covered.
    covered = np.minimum(pixels[..., 3], drawings.pixels[:, None, ..., 3]).sum((2, 3), dtype=float)
    assert np.all(covered / drawings.pixels[:, None, ..., 3].sum((2, 3)) > 0.5)
    assert len({picture.tobytes() for picture in pixels.reshape(-1, 64 * 64 * 4)}) > 2 * len(drawings)
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(redraw, "_write", None)
    np.testing.assert_array_equal(redraw.ensure_redrawn(tmp_path, "train", 3), pixels)
    assert {path.name for path in tmp_path.iterdir()} == before
