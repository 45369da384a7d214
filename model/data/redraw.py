"""A drawing as another hand might have drawn it: an SVG's shapes moved, recoloured, simplified, outlined.

    document = redraw(svg(icons, "red-apple"), np.random.default_rng(0))
    pixels = ensure_redrawn(cache, "train", 8)  # (N, 8, 64, 64, 4)

What differs between hands is not what differs between photographs: one hand shades with gradients where the
next paints flat, sets the eyes wider, leaves out a leaf's veins, draws a dark line around everything. Pixels
cannot be varied like that, shapes can. `gemini.model.data.augment` varies the pixels afterwards.
"""

import colorsys
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gemini.errors import DataError
from gemini.model.data.build import DOCUMENTS, read_sources
from gemini.model.data.drawings import SIZE, render

Shape = tuple[ElementTree.Element, ElementTree.Element]  # the element it stands in, and itself

_SVG = "http://www.w3.org/2000/svg"
_SHAPES = {"path", "circle", "ellipse", "rect", "polygon", "polyline", "line", "use"}
# What is not drawn itself: only its colours may change.
_HIDDEN = {"defs", "clipPath", "mask", "symbol", "filter", "linearGradient", "radialGradient", "pattern"}
_PAINTS = ("fill", "stroke", "stop-color")

# What shares of drawings, or of shapes, get.
_FLAT, _SIMPLE, _OUTLINED, _SWOLLEN = 0.5, 0.4, 0.2, 0.2
_LEFT_OUT, _TOGETHER = 0.04, 0.6

for _prefix, _uri in (("", _SVG), ("xlink", "http://www.w3.org/1999/xlink")):
    ElementTree.register_namespace(_prefix, _uri)


def ensure_redrawn(cache: Path, split: str, count: int, *, show: bool = False) -> NDArray[np.uint8]:
    """Every drawing of a split redrawn ``count`` times: (N, count, 64, 64, 4) uint8, RGBA, straight alpha.

    Kept beside the data, 16 kB a picture, and mapped from there; made when missing, which takes minutes.
    """
    version = read_sources(cache)["files"][DOCUMENTS]["sha256"][:8]
    path = cache / f"redrawn-{split}-{count}-{version}.npy"
    if not path.exists():
        with (cache / "drawings.jsonl").open(encoding="utf-8") as rows, (cache / DOCUMENTS).open() as lines:
            chosen = [
                (json.loads(line), count, number)
                for number, (row, line) in enumerate(zip(rows, lines, strict=True))
                if json.loads(row)["split"] == split
            ]
        _write(path, chosen, show)
    pixels: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    return pixels


def _write(path: Path, jobs: list[tuple[str, int, int]], show: bool) -> None:
    """Render on all cores, in fresh processes: forking one that has run torch's threads may hang."""
    shape = (len(jobs), jobs[0][1], SIZE, SIZE, 4)
    spawn = multiprocessing.get_context("spawn")
    try:
        with tempfile.TemporaryDirectory(prefix=".redrawn-", dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            pixels = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=shape)
            with ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=spawn) as pool:
                made = pool.map(_render_redrawn, jobs, chunksize=16)
                for row, part in enumerate(
                    tqdm(made, total=len(jobs), desc="redrawing", unit="drawing", disable=not show)
                ):
                    pixels[row] = part
            pixels.flush()
            os.replace(unfinished, path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror or error}).",
            f"Free {np.prod(shape) / 1e6:.0f} MB, or lower `redraws` in the recipe.",
        ) from error


def _render_redrawn(job: tuple[str, int, int]) -> NDArray[np.uint8]:
    document, count, number = job
    return np.stack([render(redraw(document, np.random.default_rng([number, at]))) for at in range(count)])


def redraw(document: str, generator: np.random.Generator) -> str:
    """A varied SVG document of the same size; every random number comes from ``generator``.

    The whole drawing gets one palette: hues within 15 degrees of where they were (names hold colours), more
    or less saturated and bright. Neighbouring shapes often move together, so that an eye keeps its pupil.
    """
    root = ElementTree.fromstring(document)
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    if generator.random() < _FLAT:
        _flatten(root)
    _recolour(root, generator)
    shapes = list(_shapes(root))
    if generator.random() < _SIMPLE:
        shapes = _simplify(shapes)
    if generator.random() < _OUTLINED:
        _outline(shapes, max(width, height) * generator.uniform(0.01, 0.035), generator)
    elif generator.random() < _SWOLLEN:
        _swell(shapes, max(width, height) * generator.uniform(0.005, 0.03))
    _move(shapes, (left + width / 2, top + height / 2), max(width, height), generator)
    return ElementTree.tostring(root, encoding="unicode")


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _shapes(parent: ElementTree.Element) -> Iterator[Shape]:
    """(parent, shape) of everything that is drawn, back to front."""
    for child in list(parent):
        if _tag(child) in _SHAPES:
            yield parent, child
        elif _tag(child) not in _HIDDEN:
            yield from _shapes(child)


def _flatten(root: ElementTree.Element) -> None:
    """Every gradient becomes the mean of its stops, so that nothing shades."""
    for gradient in root.iter():
        if not _tag(gradient).endswith("Gradient") or not len(gradient):
            continue
        stops = [
            (_rgb(stop.get("stop-color", "#000")), float(stop.get("stop-opacity", "1"))) for stop in gradient
        ]
        if any(colour is None for colour, _ in stops):
            continue
        weights = np.array([opacity for _, opacity in stops])
        colours = np.array([colour for colour, _ in stops])
        mean = np.average(colours, axis=0, weights=weights if weights.sum() else None)
        for stop in gradient:
            stop.set("stop-color", _hexadecimal(mean))
            stop.set("stop-opacity", f"{weights.mean():.3f}")


def _recolour(root: ElementTree.Element, generator: np.random.Generator) -> None:
    """One shift for the whole palette, a smaller one for every colour in it."""
    shift = generator.normal(0, (0.02, 0.15, 0.07))
    palette: dict[str, str] = {}
    for element in root.iter():
        for paint in _PAINTS:
            old = element.get(paint)
            if old is None:
                continue
            if old not in palette:
                colour = _rgb(old)
                own = shift + generator.normal(0, (0.012, 0.08, 0.04))
                palette[old] = old if colour is None else _shifted(colour, own)
            element.set(paint, palette[old])


def _shifted(colour: np.ndarray, shift: np.ndarray) -> str:
    """A colour with its hue turned, its saturation scaled and its value moved."""
    hue, saturation, value = colorsys.rgb_to_hsv(*colour)
    turn, richer, brighter = np.clip(shift, (-0.042, -0.4, -0.2), (0.042, 0.4, 0.2))
    hue, saturation = (hue + turn) % 1, min(1, saturation * (1 + richer))
    return _hexadecimal(
        np.array(colorsys.hsv_to_rgb(hue, saturation, float(np.clip(value + brighter, 0, 1))))
    )


def _simplify(shapes: list[Shape]) -> list[Shape]:
    """Without what lies over other shapes half transparent: lights and shadows."""
    kept = []
    for parent, shape in shapes:
        seen = float(shape.get("opacity", "1")) * float(shape.get("fill-opacity", "1"))
        if seen < 0.7 and len(shapes) > 1:
            parent.remove(shape)
        else:
            kept.append((parent, shape))
    return kept


def _outline(shapes: list[Shape], width: float, generator: np.random.Generator) -> None:
    """A dark line around every filled shape."""
    grey = generator.uniform(0, 0.3)
    line = _hexadecimal(np.clip(grey + generator.normal(0, 0.05, 3), 0, 1))
    for _, shape in shapes:
        if _is_filled(shape):
            shape.set("stroke", line)
            shape.set("stroke-width", f"{width:.3f}")
            shape.set("stroke-linejoin", "round")


def _swell(shapes: list[Shape], width: float) -> None:
    """Every filled shape a little fatter, by a line of its own colour."""
    for _, shape in shapes:
        fill = shape.get("fill")
        if fill and _is_filled(shape):
            shape.set("stroke", fill)
            shape.set("stroke-width", f"{width:.3f}")
            shape.set("stroke-linejoin", "round")


def _is_filled(shape: ElementTree.Element) -> bool:
    return shape.get("fill") != "none" and shape.get("stroke") is None and _tag(shape) != "use"


def _move(
    shapes: list[Shape], middle: tuple[float, float], size: float, generator: np.random.Generator
) -> None:
    """Every shape by a small affine map about the middle or its own first point; few are left out."""
    spread = generator.uniform(0, 1.5)  # from nearly the original to far from it
    change = None
    for number, (parent, shape) in enumerate(shapes):
        if number and len(shapes) > 3 and generator.random() < _LEFT_OUT * spread:
            parent.remove(shape)
            continue
        if change is None or generator.random() > _TOGETHER:
            x, y = _first_point(shape) or middle if generator.random() < 0.5 else middle
            across, down = generator.normal(0, 0.02 * spread * size, 2)
            wide, high = np.exp(generator.normal(0, 0.06 * spread, 2) + generator.normal(0, 0.03 * spread))
            angle = generator.normal(0, 4 * spread)
            change = (
                f"translate({x + across:.3f} {y + down:.3f}) rotate({angle:.2f}) "
                f"scale({wide:.3f} {high:.3f}) translate({-x:.3f} {-y:.3f})"
            )
        shape.set("transform", f"{change} {shape.get('transform', '')}".strip())


def _first_point(shape: ElementTree.Element) -> tuple[float, float] | None:
    """Where a path begins, or the centre of a circle or an ellipse, in the shape's own coordinates."""
    if "cx" in shape.attrib and "cy" in shape.attrib:
        return float(shape.attrib["cx"]), float(shape.attrib["cy"])
    found = re.match(r"\s*[Mm]\s*(-?[\d.]+)[\s,]*(-?[\d.]+)", shape.get("d", ""))
    return (float(found[1]), float(found[2])) if found and found[1].count(".") < 2 else None


def _rgb(paint: str) -> np.ndarray | None:
    """Red, green and blue of "#rgb" or "#rrggbb", 0 to 1; None for every other paint."""
    if not re.fullmatch(r"#(?:[0-9a-fA-F]{3}){1,2}", paint):
        return None
    digits = paint[1:] if len(paint) == 7 else "".join(2 * digit for digit in paint[1:])
    return np.array([int(digits[place : place + 2], 16) for place in (0, 2, 4)]) / 255


def _hexadecimal(colour: np.ndarray) -> str:
    return "#" + bytes(np.round(colour * 255).astype(np.uint8)).hex()
