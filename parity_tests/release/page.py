"""What a release manager reads and signs: the page of all parts, the same as JSON, and a table for the terminal."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.progress import readable_duration
from megatron_ads.reporting.page import templates, text_table
from parity_tests.release.part import Figure, Outcome, PartResult
from parity_tests.release.request import Request

_TEMPLATE = Path(__file__).with_name("release.html.jinja")
_MARKS = {True: "passed", False: "FAILED", None: ""}
_WIDTH = 120


def verdict_of(found: Sequence[PartResult]) -> str:
    """Return ``failed`` if a part failed, ``unfinished`` if one was not reached, else ``passed``."""
    if any(one.outcome is Outcome.failed for one in found):
        return "failed"
    return "unfinished" if any(one.why == "not reached yet" for one in found) else "passed"


def write_page(out: Path, found: Sequence[PartResult], *, about: Mapping[str, Any], request: Request) -> None:
    """Write release.json and release.html, each whole or not at all."""
    report = {
        "verdict": verdict_of(found),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "checkpoint": str(request.hf) if request.hf else None,
        "quick": request.quick,
        "data": str(request.data) if request.data else None,
        **about,
        "parts": [asdict(one) for one in found],
    }
    write_small(out / "release.json", json.dumps(report, indent=1) + "\n")
    write_small(out / "release.html", page(report, found))


def page(report: Mapping[str, Any], found: Sequence[PartResult]) -> str:
    """Return the page as one HTML file."""
    ran = [one for one in found if one.outcome is not Outcome.not_run]
    return (
        templates()
        .from_string(_TEMPLATE.read_text(encoding="utf-8"))
        .render(
            report=report,
            count=Counter(one.outcome.value for one in found),
            seconds=sum(one.seconds for one in ran),
            parts=[(one.name, one.outcome, _took(one), one.why or one.title) for one in found],
            ran=[(one, _rows(one.figures)) for one in ran],
            left_out=[(one.name, reason) for one in found for reason in _reasons(one)],
            versions=[(name, version or "not installed") for name, version in report["versions"].items()],
        )
    )


def _rows(figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    return [(one.name, one.value, one.limit, _MARKS[one.passed], one.note) for one in figures]


def _reasons(one: PartResult) -> list[str]:
    return [*([one.why] if one.outcome is Outcome.not_run else []), *one.left_out]


def _took(one: PartResult) -> str:
    return readable_duration(one.seconds) if one.seconds else ""


def summary(found: Sequence[PartResult], out: Path) -> str:
    """Return the table for the terminal, what failed, and where the page is."""
    rows = [
        (one.name, _MARKS[False] if one.outcome is Outcome.failed else one.outcome.value, _took(one), one.why)
        for one in found
    ]
    lines = text_table(rows, ("part", "", "took", "why"), left=("part", "", "why"), width=_WIDTH)
    return "\n".join(["", *lines, "", f"{verdict_of(found)}: {out / 'release.html'}"])
