"""Tables in Markdown."""

import re
from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """Return a table; the first row is its head. Bars and line breaks in a cell do not end it.

    With ``numbers``, every column but the first is aligned right.
    """
    ruler = ["---", *["---:" if numbers else "---"] * (len(rows[0]) - 1)]
    head, *body = [[_cell(text) for text in row] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ruler, *body))


def _cell(text: str) -> str:
    """Return a text on one line, its bars escaped, and the backslashes before a bar, which would undo that."""
    return re.sub(r"(\\*)\|", r"\1\1\\|", " ".join(text.splitlines()))
