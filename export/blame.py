"""Which module was running when a trace failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from gemini.model.hooks import hooked


@dataclass
class RunningModules:
    """Names of the modules that were entered and not left, outermost first."""

    stack: list[str] = field(default_factory=list)

    def innermost(self) -> str:
        """``layers.3.mlp (LlamaMLP)``; the whole model if nothing of it was running."""
        return self.stack[-1] if self.stack else "the model as a whole"


@contextmanager
def running_modules(model: nn.Module) -> Iterator[RunningModules]:
    """Watch a model's modules by hooks while the block runs; an exception leaves the stack as it was then."""
    running = RunningModules()
    hooks = []
    for name, module in model.named_modules():
        label = f"{name or 'model'} ({type(module).__name__})"

        def enter(_module: nn.Module, _inputs: object, label: str = label) -> None:
            running.stack.append(label)

        def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
            running.stack.pop()

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    with hooked(hooks):
        yield running
