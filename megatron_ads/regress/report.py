"""What a release manager reads: the table of AdNanny's table 8 with errors, the gate, and answers that changed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.regress import history
from megatron_ads.regress.compare import ScoreChange, average, compare, noise_of
from megatron_ads.regress.model_scores import ModelScores
from megatron_ads.reporting.page import fixed, render, text_table

HEAD = (
    "benchmark",
    "questions",
    "base",
    "tuned",
    "relative",
    "change",
    "error",
    "p",
    "other answers",
    "unfinished",
    "",
)


def report_of(base: ModelScores, tuned: ModelScores, *, margin: float, same: bool) -> dict[str, Any]:
    """Return the comparison of two models as JSON values, with the verdict.

    Args:
        base: Before.
        tuned: After.
        margin: How many points a benchmark may fall, beyond noise.
        same: Whether every answer must be the same instead.

    Raises:
        DataError: If they cannot be compared.
    """
    lines = compare(base, tuned)
    last = [average(lines)] if len(lines) > 1 else []
    noise = noise_of(len(lines))
    failed = [
        line.name for line in lines if (line.other_answers if same else line.falls_by_more_than(margin, noise=noise))
    ]
    return {
        "base": base.model,
        "tuned": tuned.model,
        "chat": base.chat,
        "limit": tuned.limit,
        "margin": margin,
        "noise": noise,
        "same": same,
        "passed": not failed,
        "failed": failed,
        "benchmarks": [_values(line, line.name not in failed) for line in lines],
        "average": _values(last[0], not failed) if last else None,
        "of_base": dict(base.provenance),
        "of_tuned": dict(tuned.provenance),
    }


def _values(line: ScoreChange, passed: bool) -> dict[str, Any]:
    return {**asdict(line), "relative": line.relative, "passed": passed}


def table_of(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows under ``HEAD``."""
    lines = [*report["benchmarks"], *([report["average"]] if report["average"] else [])]
    return [
        [
            line["name"],
            str(line["questions"]),
            fixed(line["base"]),
            fixed(line["tuned"]),
            "–" if line["relative"] is None else f"{line['relative']:+.1%}",
            f"{line['change']:+.2f}",
            fixed(line["error"], 2),
            "" if line["p"] is None else fixed(line["p"]),
            str(line["other_answers"]),
            " / ".join(map(str, line["unfinished"])),
            "" if line["passed"] or line["name"] == "average" else "FAILED",
        ]
        for line in lines
    ]


def verdict(report: Mapping[str, Any]) -> str:
    """Return the gate's outcome in one sentence."""
    names, count = ", ".join(report["failed"]), len(report["benchmarks"])
    if report["same"]:
        return f"other answers: {names}" if names else f"every answer to {count} benchmarks is the same"
    rule = f"more than {report['margin']:g} points beyond noise ({report['noise']:.2g} errors)"
    return f"{names} fell by {rule}" if names else f"none of {count} benchmarks fell by {rule}"


def summary(report: Mapping[str, Any], out: Path) -> str:
    """Return what is printed."""
    table = text_table(table_of(report), HEAD, left=("benchmark", ""))
    word = "passed" if report["passed"] else "FAILED"
    return "\n".join([*table, "", f"{word}: {verdict(report)}", f"{out / 'regress.html'}"])


def write(out: Path, report: Mapping[str, Any], releases: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write ``regress.json`` and ``regress.html``, with the releases of a history."""
    write_small(out / "regress.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    page = render(
        "regress/regress.html.jinja",
        report=report,
        rows=table_of(report),
        head=HEAD,
        verdict=verdict(report),
        facts=_facts(report),
        releases=history.rows_of(releases),
        releases_head=history.HEAD,
        chart=history.chart_of(releases),
    )
    write_small(out / "regress.html", page)


def _facts(report: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    versions = {name: report[name].get("versions", {}) for name in ("of_base", "of_tuned")}
    names = sorted({package for found in versions.values() for package in found})
    return [[name, *(str(found.get(name) or "–") for found in versions.values())] for name in names]
