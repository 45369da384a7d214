"""Strict reading of JSON objects that somebody else wrote: every access states its type and its bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemini.errors import BundleError

_REMEDY = "Copy the bundle again from its source, or compress the model again."
_INT32_MAX = (1 << 31) - 1


def damaged(cause: str) -> BundleError:
    """The error for a bundle whose bytes are not what its writer wrote."""
    return BundleError(f"The bundle is damaged: {cause}.", _REMEDY)


@dataclass(frozen=True)
class Fields:
    """One JSON object; ``where`` names it in errors. All methods raise BundleError on a wrong type."""

    raw: Any
    where: str

    @property
    def values(self) -> Mapping[str, Any]:
        if not isinstance(self.raw, dict):
            raise damaged(f"{self.where} is not an object")
        return self.raw

    def names(self) -> list[str]:
        return list(self.values)

    def has(self, name: str) -> bool:
        """True if the key exists and is not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, minimum: int, maximum: int = _INT32_MAX) -> int:
        return self._integer(self.values.get(name), name, minimum, maximum)

    def optional_integer(self, name: str, minimum: int) -> int | None:
        return self.integer(name, minimum) if self.has(name) else None

    def integers(self, name: str, minimum: int) -> tuple[int, ...]:
        return tuple(self._integer(value, name, minimum, _INT32_MAX) for value in self._list(name))

    def numbers(self, name: str) -> tuple[float, ...]:
        return tuple(self._number(value, name) for value in self._list(name))

    def number(self, name: str) -> float:
        return self._number(self.values.get(name), name)

    def text(self, name: str) -> str:
        return self._text(self.values.get(name), name)

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(self._text(value, name) for value in self._list(name))

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in choices:
            raise damaged(f"{self.where}: {name!r} is {value[:60]!r}, expected {' or '.join(choices)}")
        return value

    def section(self, name: str) -> Fields:
        """The object under a key; its own reads fail later, so reading ``values`` checks its type at once."""
        child = Fields(self.values.get(name), f"{self.where}, {name!r}")
        _ = child.values
        return child

    def sections(self, name: str) -> list[Fields]:
        children = [Fields(v, f"{self.where}, {name}[{i}]") for i, v in enumerate(self._list(name))]
        if not children:
            raise damaged(f"{self.where}: {name!r} is empty")
        return children

    def _list(self, name: str) -> list[Any]:
        value = self.values.get(name)
        if not isinstance(value, list):
            raise damaged(f"{self.where}: {name!r} is not a list")
        return value

    def _integer(self, value: Any, name: str, minimum: int, maximum: int) -> int:
        # bool is an int in Python, not in the manifest.
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise damaged(f"{self.where}: {name!r} is not an integer from {minimum} to {maximum}")
        return value

    def _number(self, value: Any, name: str) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e30:
            raise damaged(f"{self.where}: {name!r} is not a finite number")
        return float(value)

    def _text(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or not value:
            raise damaged(f"{self.where}: {name!r} is not a text")
        return value
