"""Recipes made to fit: formats planned for a size or for a loss, and planned again after measuring.

    planner = Planner(checkpoint, windows, Target(size_mb=95))
    recipe = planner.first()
    while (again := planner.resized(size_of(build(recipe)))) is not None: recipe = again

What is expected of a plan comes from a scan of the fp32 model (`gemini.compress.plan`); what it costs and
loses in truth is known once the bundle is made and measured. The next plan is corrected by the difference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gemini.compress.apply import select_mixed
from gemini.compress.calibrate import Window
from gemini.compress.experts import open_experts
from gemini.compress.plan import Plan, plan_formats, scan_formats
from gemini.compress.recipe import Recipe
from gemini.compress.specs import QuantizeMixed
from gemini.errors import RecipeError, UsageError
from gemini.model.checkpoint import Checkpoint

ATTEMPTS = 4
_FILES, _LAYER = 300_000, 2_700  # bytes of graph and report, and of each layer in them, before they are known
_CLOSE = 0.98  # a bundle may stay this much below the size asked for


@dataclass(frozen=True)
class Target:
    """What is asked of a bundle: its size, or bits a weight, or the percent of its metric it may lose."""

    size_mb: float | None = None
    bpw: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not (0 <= value < math.inf and (value or name == "max_drop")):
                option = {"size_mb": "--target-size", "bpw": "--target-bpw", "max_drop": "--max-drop"}[name]
                raise UsageError(f"{option} {value:g} is impossible.", "Give a number above 0.")
        if self.size_mb is not None and self.bpw is not None:
            raise UsageError("Two sizes are asked for.", "Give either --target-size or --target-bpw.")


class Planner:
    """Plans for one checkpoint towards one target."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Sequence[Window], target: Target, progress: bool = True
    ) -> None:
        model = checkpoint.model
        self.target = target
        spec = QuantizeMixed()
        open_experts(model)
        selection = select_mixed(model, spec)
        self.scan = scan_formats(model, selection, windows, gptq=spec.gptq, progress=progress)
        if not self.scan.choices:
            raise RecipeError("There is no layer to choose a format for.", "Use the recipe fp32.")
        stored = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
        # What stays beside the layers with a choice: other weights as they are, and files.
        tokenizer = checkpoint.tokenizer.backend_tokenizer.to_str() if checkpoint.tokenizer else ""
        files = len(tokenizer.encode()) + _FILES + _LAYER * len(self.scan.choices)
        self.others = max(0.0, sum(stored.values()) - 4.0 * self.scan.parameters) + files
        self.plans: list[Plan] = []

    def first(self) -> Recipe:
        """The first plan. RecipeError if nothing can be as small as asked."""
        if self.target.bpw is not None:
            return self._recipe(target_bpw=self.target.bpw)
        if self.target.size_mb is not None:
            # What stands beside the layers is a guess until there is a bundle: too few bits may yet do.
            try:
                return self._recipe(target_bpw=self._bits(self.target.size_mb))
            except RecipeError:
                return self._recipe(loss=math.inf)
        # A divergence of d nats a token costs a perplexity of about a factor exp(d).
        return self._recipe(loss=math.log1p((self.target.max_drop or 0.0) / 100))

    def resized(self, size: int) -> Recipe | None:
        """A better plan when the bundle's size in bytes misses the one asked for; None when it does not.

        RecipeError when no plan fits.
        """
        asked = self.target.size_mb
        if asked is None:
            return None
        before = self.plans[-1]
        others = size - before.bytes
        # Graphs differ a little from plan to plan: the largest of them counts, so that plans settle.
        self.others = others if len(self.plans) == 1 else max(self.others, others)
        fits = size / 1e6 <= asked
        if fits and (size / 1e6 >= _CLOSE * asked or len(self.plans) >= ATTEMPTS):
            return None
        if len(self.plans) >= 2 * ATTEMPTS:
            raise RecipeError(
                f"No plan came down to {asked:g} MB: the last bundle has {size / 1e6:.2f} MB.",
                "Allow a larger bundle.",
            )
        recipe = self._recipe(target_bpw=self._bits(asked))
        if fits and self.plans[-1].bytes <= before.bytes:  # nothing larger fits
            self.plans.pop()
            return None
        return recipe

    def repaired(self, drop: float | None) -> Recipe | None:
        """A plan with the worst layers raised, when the measured drop in percent is more than allowed."""
        allowed = self.target.max_drop
        sized = self.target.size_mb is not None or self.target.bpw is not None
        if allowed is None or sized or drop is None or drop <= allowed or len(self.plans) >= ATTEMPTS:
            return None
        before = self.plans[-1]
        share = math.log1p(allowed / 100) / math.log1p(drop / 100)
        recipe = self._recipe(loss=0.9 * share * before.expected_loss)
        if self.plans[-1].formats == before.formats:
            self.plans.pop()
            return None
        return recipe

    def describe(self) -> dict[str, Any]:
        """The last plan for a report: how many layers have which format, and how many plans it took."""
        last = self.plans[-1]
        return {
            "formats": dict(sorted(Counter(last.formats.values()).items())),
            "bits_per_weight": last.bits_per_weight,
            "expected_loss": last.expected_loss,
            "attempts": len(self.plans),
        }

    def _bits(self, size_mb: float) -> float:
        return max(0.0, 8 * (size_mb * 1e6 - self.others) / self.scan.parameters)

    def _recipe(self, *, target_bpw: float | None = None, loss: float = 0.0) -> Recipe:
        plan = plan_formats(self.scan, target_bpw=target_bpw, loss=loss)
        self.plans.append(plan)
        spec = QuantizeMixed(target_bpw=round(plan.bits_per_weight, 4), formats=plan.formats)
        return Recipe("mixed", (spec,))
