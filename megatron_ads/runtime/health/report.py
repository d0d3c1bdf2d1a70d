"""The report that a hung job ends with: a headline, a page to read, and the same as JSON."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime.hang_findings import Findings
from megatron_ads.runtime.health.activity import Standing
from megatron_ads.runtime.rank_ranges import describe_ranks

JSON_FILE = "hang.json"
TEXT_FILE = "hang.txt"
_CALLS = 3
"""Named in the headline, of those that a rank is awaited in."""
_LISTED = 16
"""Waiting ranks with a line of their own in the text; the JSON has all."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs."""

    host: str
    pid: int
    note: str = ""
    """What a neighbour on the same host sees of its process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HangReport:
    """One hang, as seen by the rank that asked the others."""

    asked_by: int
    seconds: float
    """For how long the rank that asked has stood still."""
    layout: ParallelLayout
    findings: Findings
    standings: Mapping[int, Standing]
    places: Mapping[int, Place]
    """Of the ranks that answered, and of those whose neighbour did."""

    def headline(self) -> str:
        """Return one line that names the cause."""
        found = self.findings
        if found.culprits:
            named = "; ".join(self._culprit(rank) for rank in found.culprits[:4])
            more = f"; and {len(found.culprits) - 4} more" if len(found.culprits) > 4 else ""
            return f"the job hangs: {named}{more}"
        if found.disagreements:
            return f"the job hangs: ranks of one group made different calls: {found.disagreements[0]}"
        if found.circle:
            waits = "; ".join(f"{self._names([rank])} waits in {self.standings[rank].wait}" for rank in found.circle)
            return f"the job hangs: ranks wait for each other in a circle: {waits}"
        return (
            "the job hangs in communication that every member has come to: look for errors of the network "
            f"(NCCL_DEBUG=INFO, system logs) at {describe_ranks(list(found.waits_for))}"
        )

    def text(self) -> str:
        """Return the page."""
        lines = [self.headline()]
        lines += self._waiting()
        for rank in (*self.findings.culprits, *self.findings.circle):
            if rank in self.standings:
                lines += [f"Python stack of {self._names([rank])}, innermost last:"]
                lines += [f"  {frame}" for frame in self.standings[rank].stack]
        lines.append(
            f"Asked by rank {self.asked_by} after {self.seconds:.1f} s without progress; "
            f"{len(self.standings)} of {self.layout.world} ranks answered. Longer times are allowed with "
            "runtime.timeout_seconds."
        )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Return everything that is known."""
        return {
            "headline": self.headline(),
            "time": time.time(),
            "asked_by": self.asked_by,
            "seconds_without_progress": round(self.seconds, 3),
            **asdict(self.findings),
            "ranks": [self._rank_as_json(rank) for rank in range(self.layout.world)],
        }

    def _rank_as_json(self, rank: int) -> dict[str, Any]:
        place, standing = self.places.get(rank), self.standings.get(rank)
        coordinates = self.layout.coordinates(rank)
        return {
            "rank": rank,
            "stage": coordinates.pp,
            "coordinates": asdict(coordinates),
            "host": place and place.host,
            "pid": place and place.pid,
            "process": place and place.note,
            "answered": standing is not None,
            **(asdict(standing) if standing else {}),
        }

    def _culprit(self, rank: int) -> str:
        return f"{self._names([rank])}{self._at(rank)} {self._doing(rank)}{self._awaited_in(rank)}"

    def _at(self, rank: int) -> str:
        place = self.places.get(rank)
        return f" on {place.host}, pid {place.pid}," if place else ""

    def _doing(self, rank: int) -> str:
        standing = self.standings.get(rank)
        if standing is None:
            place = self.places.get(rank)
            return f"does not answer{f' ({place.note})' if place and place.note else ''}"
        frame = standing.stack[-1] if standing.stack else "an unknown place"
        idle = f"{standing.idle_seconds:.1f} s without progress"
        return f"is not in a communication but at {frame}, {idle}, in {standing.phase}"

    def _awaited_in(self, rank: int) -> str:
        """Say who waits in which calls, those of the smallest groups first: they say most about what is missing."""
        waiting: dict[str, list[int]] = {}
        for other, awaited in self.findings.waits_for.items():
            if rank in awaited:
                waiting.setdefault(str(self.standings[other].wait), []).append(other)
        calls = sorted(waiting, key=lambda call: len(self._members(waiting[call][0])))
        named = [f"{self._names(waiting[call])} in {call}" for call in calls[:_CALLS]]
        return f"; waiting for it: {', and '.join(named)}" if named else ""

    def _members(self, rank: int) -> list[int]:
        wait = self.standings[rank].wait
        return wait.ranks if wait else []

    def _names(self, ranks: list[int]) -> str:
        stages = sorted({self.layout.coordinates(rank).pp for rank in ranks})
        plural = "s" if len(stages) > 1 else ""
        return f"{describe_ranks(ranks)} (stage{plural} {', '.join(map(str, stages))})"

    def _waiting(self) -> list[str]:
        lines = []
        for rank, awaited in list(self.findings.waits_for.items())[:_LISTED]:
            standing = self.standings[rank]
            assert standing.wait is not None
            for_whom = f" for {describe_ranks(awaited)}" if awaited else ""
            lines.append(
                f"  {self._names([rank])} has waited {standing.idle_seconds:.1f} s{for_whom} in {standing.wait}, call "
                f"{standing.wait.number} there, in {standing.phase}"
            )
        if len(self.findings.waits_for) > _LISTED:
            lines.append(f"  and {len(self.findings.waits_for) - _LISTED} more ranks wait; see {JSON_FILE}")
        return lines


def write_report(directory: Path, report: HangReport) -> None:
    """Leave the report in both forms."""
    from conversion.atomic_file import write_small

    directory.mkdir(parents=True, exist_ok=True)
    write_small(directory / TEXT_FILE, report.text() + "\n")
    write_small(directory / JSON_FILE, json.dumps(report.as_json(), indent=1) + "\n")
