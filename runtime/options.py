"""Generation options: frozen, checked once, filled from the bundle's defaults where the caller is silent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from gemini.errors import RequestError

DEFAULT_NEW_TOKENS = 128
CAPTION_BEAMS = 4  # names are short, and what begins likely is often not what is likely
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


@dataclass(frozen=True)
class GenerationOptions:
    """What to generate. Checked on creation: an impossible value is a RequestError.

    ``max_new_tokens=None`` means 128, or fewer where the context ends earlier. ``temperature=0`` means
    greedy. ``seed=None`` draws fresh randomness; row i of a batch uses ``seed + i``, so it equals a single
    run with it. ``num_beams`` above 1 searches with that many beams (`gemini.runtime.beams`) where nothing is
    sampled and the whole text is asked for; a stream is greedy. ``json_schema`` (its text) or ``regex``: what
    the whole answer has to be (`gemini.runtime.constrain`); one that ``max_new_tokens`` cuts is only a
    beginning of it. ``begin``: what the answer of a model with an encoder begins with and does not repeat, as
    the token of a language.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off; CTRL, arXiv:1909.05858, section 4.1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    begin: str = ""
    json_schema: str | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            _integer("max_new_tokens", self.max_new_tokens, 1)
        _integer("top_k", self.top_k, 0)
        if self.seed is not None:
            _integer("seed", self.seed, 0)
        _number("temperature", self.temperature, 0.0, 1e6)
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 1e6)
        if self.top_p == 0.0 or self.repetition_penalty == 0.0:
            raise RequestError("top_p and repetition_penalty must be above 0.", "Use 1.0 to switch them off.")
        _integer("num_beams", self.num_beams, 1)
        _number("length_penalty", self.length_penalty, -100.0, 100.0)
        if not isinstance(self.early_stopping, bool):
            raise RequestError(f"early_stopping is {self.early_stopping!r}.", "Use True or False.")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise RequestError("A stop string is empty or not a text.", "Give a tuple of non-empty texts.")
        if not isinstance(self.begin, str):
            raise RequestError(f"begin is {self.begin!r}, not a text.", "Give a text.")
        for name in ("json_schema", "regex"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text.strip()):
                raise RequestError(f"{name} is empty or not a text.", f"Give a valid {name}.")
        if self.json_schema is not None and self.regex is not None:
            raise RequestError("There are a JSON schema and a regular expression.", "Give one of them.")
        if self.constrained and self.ignore_eos:
            raise RequestError("A constrained answer has an end.", "Leave ignore_eos out.")

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0.0

    @property
    def searches(self) -> bool:
        """Whether several beams are followed."""
        return self.greedy and self.num_beams > 1

    @property
    def constrained(self) -> bool:
        """Whether a grammar says what may be written."""
        return self.json_schema is not None or self.regex is not None


class OptionArgs(TypedDict, total=False):
    """Keyword arguments of ``generate`` and ``stream``: GenerationOptions; None means "not given"."""

    max_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    ignore_eos: bool | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | None
    begin: str | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None


def make_options(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> GenerationOptions:
    """Options from the bundle's defaults overridden by ``given``; a value of None means "not given".

    Giving any sampling option without ``do_sample`` switches sampling on: asking for a temperature and
    silently getting greedy text would surprise. Unknown names are a RequestError.
    """
    known = {field.name for field in fields(GenerationOptions)}
    chosen = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(set(chosen) - known)
    if unknown:
        raise RequestError(
            f"Unknown generation option {unknown[0]!r}.", f"Known are {', '.join(sorted(known))}."
        )
    if "do_sample" not in chosen and any(name in chosen for name in _SAMPLING):
        chosen["do_sample"] = True
    if "stop" in chosen:
        stop = chosen["stop"]
        chosen["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if isinstance(schema := chosen.get("json_schema"), Mapping):
        try:
            chosen["json_schema"] = json.dumps(dict(schema))
        except (TypeError, ValueError) as error:
            raise RequestError(f"json_schema is no JSON ({error}).", "Give a valid json_schema.") from error
    usable = {name: value for name, value in defaults.items() if name in known and value is not None}
    return GenerationOptions(**{**usable, **chosen})


def _integer(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise RequestError(
            f"{name} is {value!r}, not an integer of at least {minimum}.", f"Choose a valid {name}."
        )


def _number(name: str, value: object, minimum: float, maximum: float) -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or not minimum <= float(value) <= maximum:  # type: ignore[arg-type]
        raise RequestError(
            f"{name} is {value!r}, not a number from {minimum:g} to {maximum:g}.", f"Choose a valid {name}."
        )
