"""Pages as single HTML files, from the templates beside the code that fills them, and tables for the terminal."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from conversion.atomic_file import write_small
from megatron_ads.progress import readable_duration


@cache
def templates() -> Environment:
    """Return the package's templates; HTML and SVG escape what they are given, and a missing value is an error."""
    autoescape = select_autoescape(["html.jinja", "svg.jinja"])
    found = Environment(loader=PackageLoader("megatron_ads", ""), autoescape=autoescape, undefined=StrictUndefined)
    found.filters |= {"fixed": fixed, "short": short, "tiny": tiny, "duration": readable_duration}
    return found


def render(template: str, **values: Any) -> str:
    """Return what a template makes of ``values``; its name is its path in the package: ``planning/plan.html.jinja``."""
    return templates().get_template(template).render(values)


def write_report(folder: Path, page: str, values: Mapping[str, Any]) -> None:
    """Write ``report.html`` and ``report.json``, each whole or not at all."""
    write_small(folder / "report.json", json.dumps(values, indent=2, allow_nan=False) + "\n")
    write_small(folder / "report.html", page)


def fixed(value: float | None, digits: int = 3) -> str:
    """Write a number with ``digits`` decimals; what is undefined is a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def short(value: float) -> str:
    """Write a number in at most four digits, large ones with k, M, G, T: ``15k``, ``0.012``, ``1.2e-5``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    if 0 < abs(value) < 0.01:
        digits, _, exponent = f"{value:.3e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def tiny(value: float) -> str:
    """Write a small number so that no line break comes into its exponent."""
    return short(value).replace("-", "\N{NON-BREAKING HYPHEN}")


def text_table(
    rows: Iterable[Sequence[str]], head: Sequence[str], *, left: Collection[str] = (), width: int = 1000
) -> list[str]:
    """Return the lines of a table; columns are aligned right except those in ``left``, and fold at ``width``.

    A head of empty names is not shown.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(head))
    for name in head:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(width=width, color_system=None, markup=False, highlight=False, emoji=False)
    with console.capture() as lines:
        console.print(table)
    return [line.rstrip() for line in lines.get().splitlines()]
