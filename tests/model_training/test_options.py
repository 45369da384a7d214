"""Recipes: the built-in ones load, mistakes are refused with the key that is meant."""

import pytest

from gemini.errors import RecipeError
from gemini.model.training.options import BUILTIN, TrainingOptions, load_options


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_recipes_survive_a_round_trip(name):
    options = load_options(name)
    assert options.name == name
    assert TrainingOptions.from_dict(options.to_dict()) == options


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"stepz": 3}, "Did you mean `steps`"),
        ({"tasks": {"caption": {"batch": 4, "wieght": 1}}}, "Did you mean `weight`"),
        ({"tasks": {"caption": {"batch": 0}}}, "`batch` is 0"),
        ({"tasks": {"caption": {}}}, "incomplete"),
        ({"tasks": {"translate": {"batch": 4}}}, "`task` is 'translate'"),
        ({"tasks": {}}, "no task"),
        ({"tasks": {"caption": {"batch": 4}}, "head": "classification"}, "Choose classify"),
        (
            {"head": "image-classification", "tasks": {"name": {"batch": 4}}, "lora_rank": 2},
            "Leave out `lora_rank`",
        ),
        ({"prototypes": True}, "classes of images, and the head is generation"),
        ({"fusion": "none"}, "Choose early, late, hybrid"),
        ({"learning_rate": "fast"}, "`learning_rate` is 'fast'"),
        ({"minutes": float("nan")}, "`minutes` is nan"),
    ],
)
def test_mistakes_are_refused(table, message):
    base = {"name": "x", "steps": 3, "tasks": {"caption": {"batch": 4}}}
    with pytest.raises(RecipeError, match=message):
        TrainingOptions.from_dict(base | table)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="Did you mean `nano`"):
        load_options("nan")


def test_a_broken_file_is_refused(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("steps = ")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_options(str(path))
    with pytest.raises(RecipeError, match="cannot be read"):
        load_options(str(tmp_path / "missing.toml"))


def test_four_hours_leave_each_stage_of_nano_what_it_takes():
    needed = {  # minutes on two cores with AVX2 alone (benchmarks/LOG.md)
        "sketch": 22.5,
        "tower": 49,
        "focus": 12,
        "recall": 14,
        "mimic": 22,
        "reader": 24,
        "nano": 37,
    }
    name, left, own = "nano", 240.0, {}
    while name:
        options = load_options(name)
        before = left * options.first_share if options.first else 0.0
        own[name], left, name = left - before, before, options.first
    assert own.keys() == needed.keys() and sum(own.values()) == pytest.approx(240)
    assert all(own[stage] > 1.2 * minutes for stage, minutes in needed.items())
