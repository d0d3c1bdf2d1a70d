"""The report of ``benchmarks.run``: a table for the terminal, and a page with the curves."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ads.progress import readable_duration
from megatron_ads.reporting.chart import COLORS, Chart, Series, line_chart
from megatron_ads.reporting.page import short, templates, text_table

HEAD = ("", "seconds", "of the reference", "rounds", "ratio", "spread", "baseline", "limit", "")
_WIDTH = 150


def table(report: Mapping[str, Any]) -> str:
    """Return the table of everything that was measured, and how it was judged."""
    return "\n".join(text_table(rows(report), HEAD, left=("",), width=_WIDTH)) + "\n"


def rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each finding, and for each case that failed."""
    return [row for name, record in report["cases"].items() for row in _rows_of(name, record, report["verdicts"])]


def _rows_of(name: str, record: Mapping[str, Any], verdicts: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    if record["error"]:
        yield name, *[""] * 7, f"! {record['error']}"
    for one in record["found"]:
        verdict = verdicts[one["name"]]
        said = f"! {verdict['outcome']}" if verdict["outcome"] in ("slower", "missed") else str(verdict["outcome"])
        baseline, limit = (
            f"{value:.3f}" if value is not None else "" for value in (verdict["baseline"], verdict["limit"])
        )
        if "least" in one:
            yield one["name"], "", "", "", f"{one['value']:.4f}", "", "", f"{one['least']:.4f}", said
        else:
            seconds = [short(one[side]["median"]) for side in ("work_seconds", "reference_seconds")]
            spread = f"{one['error']:.1%}"
            yield (
                one["name"], *seconds, str(one["repetitions"]), f"{one['ratio']:.3f}", spread, baseline, limit, said
            )  # fmt: skip


def page(report: Mapping[str, Any]) -> str:
    """Return the page as one HTML file."""
    found = [one for record in report["cases"].values() for one in record["found"]]
    template = (Path(__file__).parent / "speed.html.jinja").read_text(encoding="utf-8")
    cases = [(name, record["about"], readable_duration(record["seconds"])) for name, record in report["cases"].items()]
    return (
        templates()
        .from_string(template)
        .render(
            report=report,
            rows=rows(report),
            head=HEAD,
            works=[(one["name"], one["work"], one["reference"]) for one in found if "work" in one],
            cases=cases,
            charts=_charts(found),
            slower=[name for name, one in report["verdicts"].items() if one["outcome"] in ("slower", "missed")],
            without=sum(one["outcome"] == "no baseline" for one in report["verdicts"].values()),
        )
    )


def _charts(found: list[dict[str, Any]]) -> list[Chart]:
    """Draw a curve for each thing that grows: the ratio over how much of it there is."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        if one.get("growth"):
            curves.setdefault(one["growth"][0], []).append(one)
    charts = []
    for number, (what, points) in enumerate(curves.items()):
        drawn = [(one["growth"][1], one["ratio"]) for one in points]
        series = [Series(name=what, points=drawn, color=number % COLORS + 1)]
        series.append(Series(name="points", points=drawn, style="dots", color=number % COLORS + 1))
        svg = line_chart(series, x_label=what, y_label="ratio", y_from_zero=True, size=(360, 190))
        charts.append(Chart(svg, f"Speed in speeds of the reference: {points[0]['reference']}."))
    return charts
