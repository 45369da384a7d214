"""Recipes: what is accepted, what is refused, and that the refusal names the key."""

import pytest

from gemini.compress.recipe import BUILTIN, Recipe, load_recipe
from gemini.compress.specs import (
    PerBlock,
    Percentile,
    PerChannel,
    QuantizeInt4,
    QuantizeInt8,
    QuantizeNF4,
    spec_from_dict,
)
from gemini.errors import RecipeError


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_recipes_load_and_survive_a_round_trip(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_built_in_recipes_hold_the_pass_they_are_named_after():
    kinds = {name: [type(spec) for spec in load_recipe(name).specs] for name in BUILTIN}
    four = {key: [QuantizeInt4] for key in ("int4", "int4-gptq", "int4-fast")} | {"nf4": [QuantizeNF4]}
    eight = {key: [QuantizeInt8] for key in ("int8", "int8-static")}
    assert kinds == {"fp32": [], **eight, **four}


@pytest.mark.parametrize(
    "spec",
    [
        QuantizeInt8(PerChannel(), embeddings=False, skip=("a.*", "b")),
        QuantizeInt8(PerBlock(128)),
        QuantizeInt8(PerChannel(), Percentile(99.9), smoothing=0.5),
        QuantizeInt4(block_size=32, symmetric=True, fit="nearest", embedding_bits=4, skip=("x",)),
        QuantizeNF4(block_size=128, embedding_bits=32),
    ],
)
def test_specs_survive_a_round_trip_through_plain_values(spec):
    assert spec_from_dict(spec.to_dict()) == spec


def test_a_file_holds_passes_in_order(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[[pass]]\ntype = "quantize_int4"\nblock_size = 32\nskip = ["*.down_proj"]\n'
        '[[pass]]\ntype = "quantize_int8"\ngranularity = { type = "per_channel" }\n'
    )
    recipe = load_recipe(str(path))
    assert recipe == Recipe(
        "mine", (QuantizeInt4(block_size=32, skip=("*.down_proj",)), QuantizeInt8(PerChannel()))
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '[[pass]]\ntype = "quantize_int4"\nblok_size = 32\n',
            ["blok_size", "Did you mean `block_size`", "fit"],
        ),
        (
            '[[pass]]\ntype = "quantise_int4"\n',
            ["quantise_int4", "Did you mean `quantize_int4`", "quantize_nf4"],
        ),
        ("[[pass]]\nblock_size = 32\n", ["`type`", "quantize_int4"]),
        ("[[pass]]\ntype = 4\n", ["4", "quantize_int4"]),
        ('[[pass]]\ntype = "quantize_int4"\nblock_size = "64"\n', ["block_size", "'64'", "128"]),
        ('[[pass]]\ntype = "quantize_int4"\nblock_size = 48\n', ["block_size", "48", "32, 64"]),
        ('[[pass]]\ntype = "quantize_int4"\nblock_size = true\n', ["block_size", "True"]),
        ('[[pass]]\ntype = "quantize_int4"\nsymmetric = 1\n', ["symmetric", "true or false"]),
        ('[[pass]]\ntype = "quantize_int4"\nembedding_bits = 3\n', ["embedding_bits", "4, 8, 32"]),
        ('[[pass]]\ntype = "quantize_int4"\nskip = "x"\n', ["skip", "list"]),
        ('[[pass]]\ntype = "quantize_int8"\ngranularity = "channel"\n', ["granularity", "per_channel"]),
        (
            '[[pass]]\ntype = "quantize_int8"\ngranularity = { type = "per_blok" }\n',
            ["per_blok", "`per_block`"],
        ),
        ('[[pass]]\ntype = "quantize_int8"\ngranularity = { type = "per_channel", size = 1 }\n', ["`size`"]),
        ('[[pass]]\ntype = "quantize_nf4"\nblock_size = 32\n', ["block_size", "64, 128"]),
        ('[[passes]]\ntype = "quantize_int4"\n', ["passes", "Did you mean `pass`"]),
        ('[pass]\ntype = "quantize_int4"\n', ["[[pass]]"]),
        ("name = 3\n", ["name"]),
        ("[[pass]\n", ["not valid TOML"]),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, text, words):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert caught.value.remedy
    for word in words:
        assert word in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(str(tmp_path / "folder.toml"))
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"\n')
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(str(tmp_path / "latin.toml"))
    (tmp_path / "huge.toml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(str(tmp_path / "huge.toml"))


def test_an_unknown_name_suggests_the_nearest_recipe():
    with pytest.raises(RecipeError, match="Did you mean `int4`"):
        load_recipe("int44")
