"""A report as one HTML file: styles and charts inside, no scripts, no requests, light and dark, fit to print."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One headline number."""

    label: str
    value: str
    note: str = ""
    state: str = ""
    """``good``, ``bad`` or empty: how the number is marked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of text; every cell is escaped. Columns listed in ``numbers`` are aligned right."""

    head: Sequence[str] = ()
    """Names of the columns; empty: no heading."""
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """An SVG element, from ``chart.line_chart``, with the sentence under it."""

    svg: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageSection:
    """A heading and its contents; text blocks are paragraphs."""

    title: str
    blocks: Sequence[str | Table | Chart | Sequence[Chart]]


def render_page(title: str, lead: str, figures: Sequence[Figure], sections: Sequence[PageSection]) -> str:
    """Return the whole HTML document; ``lead`` is the paragraph under the title. All text is escaped."""
    page = _templates().get_template("page.html.jinja")
    return page.render(title=title, lead=lead, figures=figures, sections=sections)


@cache
def _templates() -> Environment:
    return Environment(loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined)


def write_report(folder: Path, page: str, values: Mapping[str, Any]) -> None:
    """Write ``report.html`` and ``report.json``, each whole or not at all."""
    from conversion.atomic_file import write_small  # imports torch, which a page does not need

    write_small(folder / "report.json", json.dumps(values, indent=2, allow_nan=False) + "\n")
    write_small(folder / "report.html", page)
