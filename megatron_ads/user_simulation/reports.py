"""Reports of `users`: numbers for machines, and the same as tables for the terminal, for Markdown and for a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.metrics.intervals import mean_and_interval
from megatron_ads.reporting.markdown import markdown
from megatron_ads.reporting.page import fixed, render, text_table, write_report


@dataclass(frozen=True, slots=True)
class Table:
    """A title, a head and rows of texts; the first column is names."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Pages:
    """What people read of a report."""

    title: str
    lead: str
    tables: Sequence[Table]
    notes: Sequence[str] = ()


_RESAMPLES = 500


def score_of(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean over users, ``value``, and its bootstrap ``interval``, as JSON values."""
    return mean_and_interval(values, resamples=_RESAMPLES)


def scored(score: Mapping[str, Any], digits: int = 3) -> str:
    """Write ``value`` and, where there is one, ``interval``."""
    if score["interval"] is None:
        return fixed(score["value"], digits)
    low, high = score["interval"]
    return f"{fixed(score['value'], digits)} [{fixed(low, digits)}, {fixed(high, digits)}]"


def as_text(pages: Pages) -> str:
    """Return what is printed."""
    lines = [pages.lead]
    for table in pages.tables:
        lines += ["", table.title, *text_table(table.rows, table.head, left=[table.head[0]])]
    return "\n".join([*lines, "", *pages.notes])


def as_markdown(pages: Pages) -> str:
    """Return the report as Markdown."""
    parts = [f"# {pages.title}", pages.lead]
    for table in pages.tables:
        parts += [f"## {table.title}", markdown([table.head, *table.rows], numbers=True).rstrip()]
    return "\n\n".join([*parts, *pages.notes]) + "\n"


def write(out: Path, report: Mapping[str, Any], pages: Pages, recipe: str) -> None:
    """Write report.json, report.md, report.html and the resolved recipe."""
    write_small(out / "recipe.yaml", recipe)
    write_small(out / "report.md", as_markdown(pages))
    write_report(out, render("user_simulation/report.html.jinja", pages=pages), report)
