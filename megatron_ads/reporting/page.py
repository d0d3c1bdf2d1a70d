"""A report as one HTML file: styles and charts inside, no scripts, no requests, light and dark, fit to print."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any


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
    """Rows of text; every cell is escaped. Columns listed in ``numbers`` are set right."""

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
class Section:
    """A heading and what stands under it; text blocks are paragraphs."""

    title: str
    blocks: Sequence[str | Table | Chart | Sequence[Chart]]


def render_page(title: str, lead: str, figures: Sequence[Figure], sections: Sequence[Section]) -> str:
    """Return the whole HTML document; ``lead`` is the paragraph under the title."""
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(_section(section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>
<div class="figures">{"".join(_figure(figure) for figure in figures)}</div>
{body}
</main>
</body>
</html>
"""


def write_report(folder: Path, page: str, values: Mapping[str, Any]) -> None:
    """Write ``report.html`` and ``report.json``, each whole or not at all."""
    from conversion.atomic_file import write_small  # imports torch, which a page does not need

    write_small(folder / "report.json", json.dumps(values, indent=2, allow_nan=False) + "\n")
    write_small(folder / "report.html", page)


def _figure(figure: Figure) -> str:
    return (
        f'<div class="figure {escape(figure.state)}"><div class="name">{escape(figure.label)}</div>'
        f'<div class="value">{escape(figure.value)}</div><div class="note">{escape(figure.note)}</div></div>'
    )


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f"<section><h2>{escape(section.title)}</h2>\n{blocks}</section>"


def _block(block: str | Table | Chart | Sequence[Chart]) -> str:
    match block:
        case str():
            return f"<p>{escape(block)}</p>"
        case Table():
            return _table(block)
        case Chart():
            caption = f"<figcaption>{escape(block.caption)}</figcaption>" if block.caption else ""
            return f"<figure>{block.svg}{caption}</figure>"
        case _:
            return f'<div class="small-charts">{"".join(_block(chart) for chart in block)}</div>'


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if index in table.numbers else ''}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )

    head = f"<thead><tr>{row(table.head, 'th')}</tr></thead>" if table.head else ""
    rows = "".join(f"<tr>{row(cells, 'td')}</tr>\n" for cells in table.rows)
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
