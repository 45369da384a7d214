"""What a run shows while it lasts: a bar with the time left on stderr, and curves for TensorBoard.

tensorboard --logdir OUTPUT/runs
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm


class Log:
    """Progress of one run; closing it flushes the curves."""

    def __init__(self, folder: Path, steps: int, done: int, *, show: bool) -> None:
        with warnings.catch_warnings():  # tensorboard's own imports warn on recent Pythons
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter

        # Curves of steps that a kill undid are written again; TensorBoard must forget the first ones.
        self.writer = SummaryWriter(str(folder), purge_step=done)
        self.bar = tqdm(
            total=steps, initial=done, unit="step", disable=not show, file=sys.stderr, smoothing=0.05
        )

    def step(self, step: int, values: Mapping[str, float], rate: float) -> None:
        """One step's losses by task and its learning rate."""
        for name, value in values.items():
            self.writer.add_scalar(f"loss/{name}", value, step)
        self.writer.add_scalar("learning_rate", rate, step)
        self.bar.set_postfix({name: f"{value:.2f}" for name, value in values.items()}, refresh=False)
        self.bar.update()

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Figures on the validation split, also as a line that stays on the screen."""
        for name, value in values.items():
            self.writer.add_scalar(f"valid/{name}", value, step)
        figures = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"step {step}: {figures}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self.bar.disable:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Write out what is pending."""
        self.bar.close()
        self.writer.close()
