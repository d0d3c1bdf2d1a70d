"""Releases after one another: a line of JSON for each comparison, and the curves of their scores.

A file under version control, such as ``benchmarks/baselines/regress.jsonl``, tells a slow decline that no single
comparison, whose base is the release before, can see.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.errors import DataError
from megatron_ads.reporting.chart import COLORS, Chart, Series, line_chart

HEAD = ("", "date", "base", "tuned", "questions", "average", "")


def read_history(file: Path) -> list[dict[str, Any]]:
    """Return the releases of a history, the oldest first; none if there is no file yet.

    Raises:
        DataError: With the number of a line that is none of a history.
    """
    if not file.exists():
        return []
    releases = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            release = json.loads(line)
            {name: float(score) for name, score in release["scores"].items()}
            release["date"], release["base"], release["tuned"], release["questions"], release["passed"]
        except (ValueError, TypeError, LookupError, AttributeError):
            raise DataError(
                f"{file}, line {number} is no release of a history. Remove it, or name another file."
            ) from None
        releases.append(release)
    return releases


def add_release(file: Path, report: Mapping[str, Any], releases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Write a comparison behind the earlier ones; one that says the same as the last takes its place.

    Args:
        file: The history; written whole or not at all.
        report: Of ``report_of``.
        releases: What ``file`` holds.
    """
    release = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "base": report["base"],
        "tuned": report["tuned"],
        "questions": sum(line["questions"] for line in report["benchmarks"]),
        "passed": report["passed"],
        "scores": {line["name"]: line["tuned"] for line in report["benchmarks"]},
    }
    kept = [dict(one) for one in releases]
    if kept and {**kept[-1], "date": release["date"]} == release:
        kept.pop()
    kept.append(release)
    write_small(file, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in kept))
    return kept


def chart_of(releases: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Draw the scores of each benchmark over the releases; None with fewer than two."""
    if len(releases) < 2:
        return None
    names = list(dict.fromkeys(name for release in releases for name in release["scores"]))
    series = [
        Series(
            name=name,
            points=[(number, release["scores"].get(name)) for number, release in enumerate(releases, 1)],
            color=place % COLORS + 1,
        )
        for place, name in enumerate(names)
    ]
    drawn = line_chart(series, x_label="release", y_label="score", y_limits=(0.0, 1.0))
    return Chart(drawn, "Share of questions answered well by each tuned model, in the order of the table.")


def rows_of(releases: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the lines of a table under ``HEAD``."""
    return [
        [
            str(number),
            release["date"],
            release["base"],
            release["tuned"],
            f"{release['questions']:,}",
            f"{sum(release['scores'].values()) / len(release['scores']):.3f}" if release["scores"] else "–",
            "" if release["passed"] else "FAILED",
        ]
        for number, release in enumerate(releases, 1)
    ]
