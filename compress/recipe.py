"""Recipes: ordered specs, built in (see BUILTIN) or read from the user's TOML file.

[[pass]]
type = "quantize_int4"
block_size = 32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini.compress.specs import Spec, reject_unknown, spec_from_dict
from gemini.errors import RecipeError
from gemini.model.recipe_file import read_recipe

BUILTIN = ("fp32", "int8", "int8-static", "int4", "int4-gptq", "int4-fast", "nf4")
_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A name and the passes to run, in order; no pass at all leaves the weights fp32."""

    name: str
    specs: tuple[Spec, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the manifest, in the same shape as the TOML file plus the name."""
        return {"name": self.name, "pass": [spec.to_dict() for spec in self.specs]}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Recipe:
        """Inverse of ``to_dict``; RecipeError for unknown keys, unknown passes and wrong values."""
        reject_unknown(table, ("name", "pass"), "the recipe")
        name, passes = table.get("name", "custom"), table.get("pass", [])
        if not isinstance(name, str) or not name:
            raise RecipeError(f"`name` is {name!r}.", "Write a text.")
        if not isinstance(passes, list) or not all(isinstance(item, Mapping) for item in passes):
            raise RecipeError("`pass` is not a list of tables.", "Start each pass with a line [[pass]].")
        return cls(name, tuple(spec_from_dict(item) for item in passes))


def load_recipe(name_or_path: str) -> Recipe:
    """The built-in recipe of that name, or the one in that ``.toml`` file (RecipeError if there is none)."""
    return Recipe.from_dict(read_recipe(name_or_path, BUILTIN, _FOLDER))
