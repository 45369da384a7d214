"""Hooks of torch modules that come off again whatever happens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Inside the block the hooks are on; handed a generator, those before one that fails come off, too."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield
