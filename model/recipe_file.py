"""Finding and reading a recipe, whatever it says: a built-in one by its name, or a TOML file."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemini.errors import RecipeError

_LARGEST_FILE = 1 << 20  # bytes; a recipe is a page of text, anything larger is a mistaken path


def read_recipe(name_or_path: str, builtin: Sequence[str], folder: Path) -> dict[str, Any]:
    """The table of the built-in recipe of that name (``folder``/name.toml), or of that ``.toml`` file.

    Its "name" is the file's unless it states one. RecipeError if there is none, or it is no TOML.
    """
    path = folder / f"{name_or_path}.toml" if name_or_path in builtin else Path(name_or_path)
    if path.suffix != ".toml":
        near = difflib.get_close_matches(name_or_path, builtin, n=1)
        hint = f"Did you mean `{near[0]}`? " if near else ""
        raise RecipeError(
            f"There is no recipe `{name_or_path}`.",
            f"{hint}Choose {', '.join(builtin)}, or give a .toml file.",
        )
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
    return {"name": path.stem, **table}
