"""What a training run does: a frozen set of options, read from a built-in recipe or from a TOML file.

    load_options("nano")

size = "nano"
steps = 4000
learning_rate = 1e-3

[tasks.caption]
batch = 96

Unknown keys are refused: a misspelt option must not train for an hour with its default.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gemini.errors import RecipeError
from gemini.model.recipe_file import read_recipe

BUILTIN = ("nano", "reader", "mimic", "recall", "focus", "tower", "sketch", "pretrain", "caption", "classify")
HEADS = {  # and the tasks that each can learn
    "generation": ("caption", "continue", "denoise", "classify"),
    "classification": ("classify",),
    "regression": ("mimic",),
    "image-classification": ("name",),
}
FUSIONS = ("early", "late", "hybrid")
_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class TaskOptions:
    """One task of the mixture: each ``every`` steps ``batch`` examples; their loss counts ``weight`` times.

    ``adversarial`` is the radius of the perturbation of FGM (0: off), ``noise`` the share of words dropped,
    swapped or misspelt in reviews, ``languages`` which of them to use. ``teacher`` is a file of soft labels
    (see ``tasks.read_teacher``), or all-minilm-l6-v2 to have it made (`gemini.model.training.teacher`). In
    targets of reviews they have the weight ``teacher_share``; the file's other texts are learnt too. Drawings
    are shown with ``pixels`` along a side (0: as they are); in training they are redrawn ``redraws`` times
    beforehand (`gemini.model.data.redraw`), and the share ``still`` of them is left in place and sharp.
    """

    batch: int
    every: int = 1
    weight: float = 1.0
    label_smoothing: float = 0.0
    adversarial: float = 0.0
    noise: float = 0.0
    languages: tuple[str, ...] = ("en", "zh")
    teacher: str = ""
    teacher_share: float = 0.5
    pixels: int = 0
    redraws: int = 0
    still: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "languages", tuple(self.languages))
        _check_range("batch", self.batch, 1, 4096)
        _check_range("every", self.every, 1, 10_000)
        _check_range("weight", self.weight, 0, 100)
        _check_range("label_smoothing", self.label_smoothing, 0, 0.9)
        _check_range("adversarial", self.adversarial, 0, 100)
        _check_range("noise", self.noise, 0, 0.9)
        _check_range("teacher_share", self.teacher_share, 0, 1)
        _check_range("pixels", self.pixels, 0, 64)
        _check_range("redraws", self.redraws, 0, 1000)
        _check_range("still", self.still, 0, 1)
        if not self.languages or not set(self.languages) <= {"en", "zh"}:
            raise RecipeError(
                f"`languages` is {list(self.languages)}.", 'Write ["en"], ["zh"] or ["en", "zh"].'
            )


@dataclass(frozen=True)
class TrainingOptions:
    """A whole run. ``model`` holds further fields of ``GeminiConfig``; ``start`` is a checkpoint's folder.

    ``first`` names a recipe that is trained before, unless there is a checkpoint to start from; this run then
    starts from its result, and of ``minutes`` it gets the part ``first_share``. ``freeze_tower`` keeps the
    convolutional tower as it starts, which makes a step on drawings half as long. With ``prototypes`` each
    name gets one (`gemini.model.gemini.prototypes`), and the models that start from this one see nothing else
    of an image; with ``freeze_tower`` they keep what those are recognized by, too.

    The encoder's layers learn at ``encoder_rate`` times the ``learning_rate``: beside a decoder that starts
    at random they would lose some of what they were taught before.

    ``minutes`` limits the time of the training itself (0: no limit); the learning rate then falls to zero at
    whichever end comes first. ``patience`` evaluations without a better validation loss end it (0: never).
    """

    name: str
    tasks: Mapping[str, TaskOptions]
    steps: int
    head: str = "generation"
    size: str = "nano"
    fusion: str = "early"
    model: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""
    first: str = ""
    first_share: float = 0.5
    freeze_tower: bool = False
    prototypes: bool = False
    seed: int = 0
    minutes: float = 0.0
    learning_rate: float = 1e-3
    encoder_rate: float = 1.0
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    ema_decay: float = 0.999
    lora_rank: int = 0
    lora_alpha: int = 16
    save_every: int = 100
    evaluate_every: int = 250
    evaluate_samples: int = 200
    patience: int = 0
    encoder_tokens: int = 96
    decoder_tokens: int = 160
    vocabulary: int = 8192

    def __post_init__(self) -> None:
        _check_choice("head", self.head, tuple(HEADS))
        _check_choice("fusion", self.fusion, FUSIONS)
        _check_range("steps", self.steps, 1, 10_000_000)
        _check_range("minutes", self.minutes, 0, 60 * 24 * 30)
        _check_range("first_share", self.first_share, 0.01, 0.99)
        _check_range("learning_rate", self.learning_rate, 0, 1)
        _check_range("encoder_rate", self.encoder_rate, 0, 1)
        _check_range("warmup", self.warmup, 0, 1_000_000)
        _check_range("weight_decay", self.weight_decay, 0, 1)
        _check_range("clip", self.clip, 1e-6, 1e6)
        _check_range("ema_decay", self.ema_decay, 0, 1)
        _check_range("lora_rank", self.lora_rank, 0, 1024)
        _check_range("encoder_tokens", self.encoder_tokens, 4, 160)
        _check_range("decoder_tokens", self.decoder_tokens, 4, 160)
        _check_range("save_every", self.save_every, 1, 1_000_000)
        _check_range("evaluate_every", self.evaluate_every, 1, 1_000_000)
        _check_range("patience", self.patience, 0, 1_000_000)
        if not self.tasks:
            raise RecipeError(
                "The recipe has no task.", "Add a table such as [tasks.caption] with `batch = 64`."
            )
        for name in self.tasks:
            _check_choice("task", name, HEADS[self.head])
        attacked = any(task.adversarial for task in self.tasks.values())
        if self.head == "image-classification" and (self.lora_rank or attacked or self.encoder_rate != 1):
            raise RecipeError(
                "Head image-classification has no layers of an encoder, and no tokens to embed.",
                "Leave out `lora_rank`, `adversarial` and `encoder_rate`.",
            )
        if self.prototypes and self.head != "image-classification":
            raise RecipeError(
                f"`prototypes` are learnt by the classes of images, and the head is {self.head}.",
                'Learn them in a recipe of its own, with `head = "image-classification"`, and start from it.',
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values; ``from_dict`` is the inverse."""
        table = asdict(self)
        for task in table["tasks"].values():
            task["languages"] = list(task["languages"])
        return table

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> TrainingOptions:
        """Options from the tables of a TOML file; RecipeError for unknown keys and wrong values."""
        _reject_unknown(table, cls, "the recipe")
        tasks = table.get("tasks", {})
        if not isinstance(tasks, Mapping) or not all(isinstance(task, Mapping) for task in tasks.values()):
            raise RecipeError("`tasks` is not a table of tables.", "Start each task with [tasks.NAME].")
        for name, task in tasks.items():
            _reject_unknown(task, TaskOptions, f"[tasks.{name}]")
        try:
            return cls(**{**table, "tasks": {name: TaskOptions(**task) for name, task in tasks.items()}})
        except TypeError as error:  # a field without a default is missing
            raise RecipeError(f"The recipe is incomplete: {error}.", "Add the missing keys.") from error


def load_options(name_or_path: str) -> TrainingOptions:
    """The built-in recipe of that name, or the one in that ``.toml`` file (RecipeError if there is none)."""
    return TrainingOptions.from_dict(read_recipe(name_or_path, BUILTIN, _FOLDER))


def _reject_unknown(table: Mapping[str, Any], cls: type, where: str) -> None:
    known: Iterable[str] = [item.name for item in fields(cls)]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean `{near[0]}`? " if near else ""
            raise RecipeError(f"`{key}` is no option of {where}.", f"{hint}It knows: {', '.join(known)}.")


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"`{key}` is {value!r}.", f"Choose {', '.join(choices)}.")


def _check_range(key: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise RecipeError(f"`{key}` is {value!r}.", f"Give a number from {low:g} to {high:g}.")
