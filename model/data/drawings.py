"""Emoji drawings with their names: from icon sets and a table of names to pixels, captions and splits.

An icon set is a JSON file of SVG bodies under readable names ("grinning-face"). Most sets say which character
each name draws; the names of one that does not are looked up in what the others say, and in the table of
names itself. One thing is one key (the hexadecimal code points); skin tones, letters of flags and other parts
have no key, so every thing appears once a set.
"""

import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemini.errors import DataError
from gemini.model.data.splits import fraction

SIZE = 64
TRAIN_SETS = ("noto", "noto-v1", "twemoji")
TEST_SET = "fluent-emoji-flat"
RESERVED = 150
_VALID_SHARE = 0.05
# Group 2 of the names is skin tones and hair; the letters of which flags are made have no group.
_PARTS = (None, 2)


@dataclass(frozen=True)
class Name:
    """What a thing is called, in English (lower case) and Chinese."""

    en: str
    zh: str


@dataclass(frozen=True)
class Drawing:
    """One row of drawings.jsonl: which thing in which set, its names, its split."""

    set: str
    key: str
    en: str
    zh: str
    split: str


def read_names(en: bytes, zh: bytes) -> dict[str, Name]:
    """Key -> names, from the two tables of emojibase-data; parts of other emoji are left out."""
    chinese = {entry["hexcode"]: entry["label"] for entry in json.loads(zh)}
    return {
        _key(entry["hexcode"]): Name(_clean(entry["label"]).lower(), _clean(chinese[entry["hexcode"]]))
        for entry in json.loads(en)
        if entry.get("group") not in _PARTS and entry["hexcode"] in chinese
    }


def match_icons(
    icons: Mapping[str, Any], chars: Mapping[str, str], slugs: Mapping[str, str], keys: Iterable[str]
) -> dict[str, str]:
    """Key -> icon name of one set: what the set itself says first, then what its icons are called."""
    keys = set(keys)
    found = {_key(code): name for code, name in chars.items() if _key(code) in keys}
    for name in [*sorted(icons["icons"]), *sorted(icons.get("aliases", {}))]:
        key = slugs.get(name)
        if key in keys and key not in found:
            found[key] = name
    return found


def slug_table(
    names: Mapping[str, Name], sets: Iterable[tuple[Mapping[str, Any], Mapping[str, str]]]
) -> dict[str, str]:
    """Icon name -> key, agreed on by the English names, the sets' own tables and their aliases.

    A name that two of them give to two things stands for none: "up-button" is "UP! button" written as a slug
    and an alias of "upwards-button".
    """
    table: dict[str, set[str]] = {}
    for key, called in names.items():
        table.setdefault(_slug(called.en), set()).add(key)
    for icons, chars in sets:
        own = {name: _key(code) for code, name in chars.items() if _key(code) in names}
        for name, alias in icons.get("aliases", {}).items():
            # An alias with a flip or a rotation is another thing: the hand that points the other way.
            if set(alias) == {"parent"} and alias["parent"] in own:
                own.setdefault(name, own[alias["parent"]])
        for name, key in own.items():
            table.setdefault(name, set()).add(key)
    return {name: next(iter(keys)) for name, keys in table.items() if len(keys) == 1}


def svg(icons: Mapping[str, Any], name: str) -> str:
    """The SVG document of an icon, aliases and their flips applied."""
    flips: list[str] = []
    icon: Mapping[str, Any] = icons["icons"].get(name, {})
    for _ in range(8):  # an alias may name another alias; a circle of them ends here
        if icon:
            break
        alias = icons.get("aliases", {}).get(name, {})
        flips += [flip for flip in ("hFlip", "vFlip") if alias.get(flip)]
        name = alias.get("parent", "")
        icon = icons["icons"].get(name, {})
    if not isinstance(icon.get("body"), str):
        raise DataError(f"The icon set {icons.get('prefix')} has no drawing {name!r}.", "Fetch it again.")
    box = {
        field: icon.get(field, icons.get(field, default))
        for field, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    }
    body = icon["body"]
    if flips.count("hFlip") % 2:
        body = f'<g transform="translate({2 * box["left"] + box["width"]} 0) scale(-1 1)">{body}</g>'
    if flips.count("vFlip") % 2:
        body = f'<g transform="translate(0 {2 * box["top"] + box["height"]}) scale(1 -1)">{body}</g>'
    view = " ".join(str(box[field]) for field in ("left", "top", "width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{view}">{body}</svg>'
    )


def render(document: str) -> NDArray[np.uint8]:
    """Pixels of an SVG document, (64, 64, 4) RGBA with straight alpha.

    Raises:
        DataError: resvg or pillow is not installed, or the document cannot be drawn.
    """
    try:
        import resvg_py
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"Rendering drawings needs resvg and pillow ({error}).",
            "Install them with `pip install 'gemini-edge[train]'`.",
        ) from error
    try:
        png = resvg_py.svg_to_bytes(svg_string=document, skip_system_fonts=True)
    except ValueError as error:
        raise DataError(f"A drawing cannot be rendered ({error}).", "Fetch its set again.") from error
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGBA"), dtype=np.uint8)


def assign_splits(found: Mapping[str, Iterable[str]], names: Mapping[str, Name]) -> list[Drawing]:
    """Give every drawing its split. `found` maps a set's name to the keys it draws.

    - ``unseen``: the test set's drawings of the 150 reserved names, which no other split contains.
    - ``train``: the training sets' drawings of all other names, less ``valid``.
    - ``valid``: one drawing each of 5 % of the names that have at least two in training.
    - ``test``: the test set's drawings of names in ``train``.

    Drawings that would tell a reserved name away are dropped. Hashes of the English name decide, so that two
    things of one name share their fate and a new version of a set moves nothing else.
    """
    drawn = {
        name: {names[key].en for key in found.get(name, ()) if key in names}
        for name in (*TRAIN_SETS, TEST_SET)
    }
    seen = set().union(*(drawn[name] for name in TRAIN_SETS))
    reserved = set(sorted(drawn[TEST_SET] & seen, key=lambda en: fraction(en, "reserved"))[:RESERVED])
    held_out: dict[str, str] = {}
    for en in seen - reserved:
        hands = [name for name in TRAIN_SETS if en in drawn[name]]
        if len(hands) > 1 and fraction(en, "valid") < _VALID_SHARE:
            held_out[en] = min(hands, key=lambda name: fraction(en, name))
    rows = []
    for name in (*TRAIN_SETS, TEST_SET):
        for key in sorted(found.get(name, ())):
            en = names[key].en
            if name == TEST_SET:
                split = "unseen" if en in reserved else "test" if en in seen else None
            else:
                split = None if en in reserved else "valid" if held_out.get(en) == name else "train"
            if split is not None:
                rows.append(Drawing(name, key, en, names[key].zh, split))
    return rows


def build_drawings(
    sets: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]],
    names: Mapping[str, Name],
    progress: Callable[[Iterable[Drawing], int], Iterable[Drawing]] = lambda rows, total: rows,
) -> tuple[NDArray[np.uint8], list[Drawing], list[str]]:
    """Render every matched drawing: pixels (N, 64, 64, 4), rows that describe them, and SVG documents.

    Args:
        sets: set name -> (icons.json, chars.json or {}).
        progress: wraps the rows while they are rendered.
    """
    slugs = slug_table(names, sets.values())
    found = {name: match_icons(icons, chars, slugs, names) for name, (icons, chars) in sets.items()}
    rows = assign_splits(found, names)
    pixels = np.empty((len(rows), SIZE, SIZE, 4), np.uint8)
    documents = [svg(sets[row.set][0], found[row.set][row.key]) for row in rows]
    for index, _ in enumerate(progress(rows, len(rows))):
        pixels[index] = render(documents[index])
    return pixels, rows, documents


def _key(code: str) -> str:
    """Code points in lower case without variation selectors, which sets write or leave out at will."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _clean(label: str) -> str:
    return " ".join(unicodedata.normalize("NFC", label).split())


def _slug(label: str) -> str:
    """A name as icon sets write it: "flag: Côte d’Ivoire" is "flag-cote-divoire"."""
    plain = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")
