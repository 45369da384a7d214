"""Icons find their names, are drawn the right way round, and no reserved name is ever trained on."""

from typing import Any

import numpy as np
import pytest

from gemini.errors import DataError
from gemini.model.data.drawings import (
    RESERVED,
    TEST_SET,
    TRAIN_SETS,
    Name,
    assign_splits,
    match_icons,
    read_names,
    render,
    slug_table,
    svg,
)

CORNER = '<path fill="#f00" d="M0 0h8v4H0z"/>'  # the left half of the upper quarter of 16 × 16


def set_of(*names: str, **aliases: dict[str, Any]) -> dict[str, Any]:
    return {"prefix": "toy", "icons": {name: {"body": CORNER} for name in names}, "aliases": aliases}


def test_names_leave_out_parts_and_fold_case() -> None:
    en = b"""[{"hexcode": "1F600", "label": "Red  Ball", "group": 1}, {"hexcode": "1F1E6", "label": "letter"},
              {"hexcode": "1F3FB", "label": "skin tone", "group": 2}, {"hexcode": "2B-FE0F", "label": "plus",
              "group": 0}]"""
    assert read_names(en, en) == {"1f600": Name("red ball", "Red Ball"), "2b": Name("plus", "plus")}


def test_an_icon_is_found_by_character_by_name_and_by_another_sets_alias() -> None:
    names = {"a": Name("red ball", ""), "b": Name("flag: côte d’ivoire", ""), "c": Name("man: tall", "")}
    told = set_of("ball", adult={"parent": "ball"})
    table = slug_table(names, [(told, {"A-FE0F": "ball"})])
    assert match_icons(told, {"A-FE0F": "ball"}, table, names) == {"a": "ball"}
    untold = set_of("adult", "flag-cote-divoire", "man-tall", "stranger")
    expected = {"a": "adult", "b": "flag-cote-divoire", "c": "man-tall"}
    assert match_icons(untold, {}, table, names) == expected


def test_a_name_that_stands_for_two_things_stands_for_none() -> None:
    names = {"a": Name("up! button", ""), "b": Name("upwards button", "")}
    other = set_of("upwards-button", **{"up-button": {"parent": "upwards-button"}})
    table = slug_table(names, [(other, {"b": "upwards-button"})])
    assert table == {"upwards-button": "b"}


def test_a_mirrored_alias_is_another_thing() -> None:
    hands = set_of("left-hand", hand={"parent": "left-hand"}, other={"parent": "left-hand", "hFlip": True})
    table = slug_table({"a": Name("left hand", "")}, [(hands, {"a": "left-hand"})])
    assert table == {"left-hand": "a", "hand": "a"}


def test_flips_of_aliases_mirror_the_pixels() -> None:
    icons = set_of(
        "one",
        across={"parent": "one", "hFlip": True},
        over={"parent": "one", "vFlip": True},
        back={"parent": "across", "hFlip": True},
    )
    drawn = {name: render(svg(icons, name)) for name in ("one", "across", "over", "back")}
    plain = drawn["one"]
    expected = np.zeros((64, 64, 4), np.uint8)
    expected[:16, :32] = (255, 0, 0, 255)
    np.testing.assert_array_equal(plain, expected)
    np.testing.assert_array_equal(drawn["across"], plain[:, ::-1])
    np.testing.assert_array_equal(drawn["over"], plain[::-1])
    np.testing.assert_array_equal(drawn["back"], plain)


def test_a_wide_drawing_keeps_its_shape() -> None:
    icon = {"icons": {"wide": {"body": '<path fill="#000" d="M0 0h32v16H0z"/>', "width": 32}}}
    alpha = render(svg(icon, "wide"))[..., 3]
    assert alpha[16:48].min() == 255 and alpha[:16].max() == 0 == alpha[48:].max()


@pytest.mark.parametrize("aliases", [{}, {"a": {"parent": "b"}, "b": {"parent": "a"}}])
def test_an_icon_that_leads_nowhere_is_an_error(aliases: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="no drawing"):
        svg(set_of("one", **aliases), "a")


def test_a_broken_body_is_an_error() -> None:
    with pytest.raises(DataError, match="cannot be rendered"):
        render(svg({"icons": {"bad": {"body": "<path"}}}, "bad"))


@pytest.fixture
def names() -> dict[str, Name]:
    """600 things; two of them share a name."""
    return {f"{i:04x}": Name("twin" if i in (7, 8) else f"thing {i}", f"东西{i}") for i in range(600)}


@pytest.fixture
def found(names: dict[str, Name]) -> dict[str, list[str]]:
    keys = list(names)
    return {"noto": keys[:500], "noto-v1": keys[:300], "twemoji": keys[5:550], TEST_SET: keys[:8] + keys[20:]}


def test_no_split_tells_another_away(names: dict[str, Name], found: dict[str, list[str]]) -> None:
    rows = assign_splits(found, names)
    by_split = {split: {row.en for row in rows if row.split == split} for split in ("train", "valid", "test")}
    unseen = {row.en for row in rows if row.split == "unseen"}
    assert len(unseen) == RESERVED and not unseen & set().union(*by_split.values())
    assert by_split["test"] <= by_split["train"] and by_split["valid"] <= by_split["train"]
    assert {row.set for row in rows if row.split in ("train", "valid")} == set(TRAIN_SETS)
    assert {row.set for row in rows if row.split in ("test", "unseen")} == {TEST_SET}
    held_out = [row.en for row in rows if row.split == "valid"]
    assert len(held_out) == len(set(held_out))
    # 5 % of about 390 names with two drawings: a binomial, 4 standard deviations to each side.
    assert 2 < len(held_out) < 37
    assert len({(row.set, row.key) for row in rows}) == len(rows)


def test_splits_do_not_depend_on_order_or_on_other_sets(
    names: dict[str, Name], found: dict[str, list[str]]
) -> None:
    rows = assign_splits(found, names)
    assert assign_splits({name: found[name][::-1] for name in reversed(found)}, names) == rows
    more = assign_splits(found | {"twemoji": list(names)[5:]}, names)
    before = {(row.set, row.key): row.split for row in rows}
    after = {(row.set, row.key): row.split for row in more if (row.set, row.key) in before}
    changed = {key for key, split in after.items() if split != before[key]}
    # Newly seen names may push others out of the reserved ones; nothing else moves.
    assert all({before[key], after[key]} <= {"test", "unseen"} for key in changed)
