"""Tables in pages of documentation, between the comments <!-- name:begin --> and <!-- name:end -->."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gemini.errors import UsageError


def replace_section(page: str, name: str, content: str) -> str:
    """The page with ``content`` between the two comments of that name.

    UsageError unless each of them is there once, in order.
    """
    opening, closing = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, begin, rest = page.partition(opening)
    _, end, tail = rest.partition(closing)
    if not begin or not end or opening in rest or closing in tail or closing in head:
        raise UsageError(
            f"The page does not hold {opening} and {closing} once each, in this order.",
            "Put the two comments where the table belongs.",
        )
    return f"{head}{opening}\n\n{content}\n\n{closing}{tail}"


def update_page(path: Path, name: str, content: str, *, check: bool = False) -> None:
    """Put ``content`` into the page at ``path``; with ``check`` nothing is written.

    UsageError for a page that cannot be read or lacks the comments and, with ``check``, for a stale one.
    """
    page = read_page(path)
    made = replace_section(page, name, content)
    if made == page:
        return
    if check:
        raise UsageError(f"The table of {path} is stale.", "Run the same without --check.")
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_text(made, encoding="utf-8")
    os.replace(unfinished, path)


def read_page(path: Path) -> str:
    """UTF-8 text of a page or a result; UsageError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}).", "Check the path.") from None


def markdown_lines(rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown; the first row is the heading, all columns but the first stand to the right."""
    head, *rest = [list(row) for row in rows]
    ruled = [head, ["---", *["---:"] * (len(head) - 1)], *rest]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)
