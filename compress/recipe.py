"""Recipes: ordered specs, built in (fp32, int8, int4, nf4) or read from the user's TOML file.

[[pass]]
type = "quantize_int4"
block_size = 32
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini.compress.specs import Spec, reject_unknown, spec_from_dict
from gemini.errors import RecipeError

BUILTIN = ("fp32", "int8", "int4", "nf4")
_FOLDER = Path(__file__).parent / "recipes"
_LARGEST_FILE = 1 << 20  # bytes; a recipe is a page of text, anything larger is a mistaken path


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
    if name_or_path in BUILTIN:
        return _read(_FOLDER / f"{name_or_path}.toml", name_or_path)
    path = Path(name_or_path)
    if path.suffix != ".toml":
        near = difflib.get_close_matches(name_or_path, BUILTIN, n=1)
        hint = f"Did you mean `{near[0]}`? " if near else ""
        raise RecipeError(
            f"There is no recipe `{name_or_path}`.",
            f"{hint}Choose {', '.join(BUILTIN)}, or give a .toml file.",
        )
    return _read(path, path.stem)


def _read(path: Path, name: str) -> Recipe:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise RecipeError(f"The recipe {path} is larger than 1 MiB.", "Give a recipe file.")
        table = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise RecipeError(f"The recipe {path} cannot be read: {reason}.", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"The recipe {path} is not UTF-8 text.", "Save it as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"The recipe {path} is not valid TOML: {error}.", "Correct that line.") from error
    return Recipe.from_dict({"name": name, **table})
