"""From the current state of every rank to the ranks that the others wait for, and the report that says so.

A rank in a communication waits for those who must make the same call and have not: they have made fewer calls on its
channel. Among these, the ones that wait for others themselves are victims too; what remains is the cause. The report
is a headline, a page to read, and the same as JSON.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ads.layout import ParallelLayout, describe_ranks
from megatron_ads.runtime.health.activity import RankState, Wait

JSON_FILE = "hang.json"
TEXT_FILE = "hang.txt"
_CALLS = 3
"""Named in the headline, of those that a rank is awaited in."""
_LISTED = 16
"""Waiting ranks with a line of their own in the text; the JSON has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a hang is about; ranks in ascending order."""

    culprits: list[int]
    """Ranks that others wait for and that are in no communication themselves, or do not answer."""
    silent: list[int]
    """Ranks that did not answer."""
    waits_for: dict[int, list[int]]
    """By waiting rank: who has not come to its communication."""
    disagreements: list[str] = field(default_factory=list)
    """Calls that all members have reached, but not with the same operation or tensors."""
    circle: list[int] = field(default_factory=list)
    """Ranks that wait for each other, each for the next and the last for the first."""


def find(states: Mapping[int, RankState], world: int) -> Findings:
    """Return the findings from the states of the ranks that answered."""
    silent = [rank for rank in range(world) if rank not in states]
    waits_for = {
        rank: sorted(_awaited(rank, state.wait, states))
        for rank, state in sorted(states.items())
        if state.wait is not None
    }
    awaited = {rank for ranks in waits_for.values() for rank in ranks}
    culprits = sorted(rank for rank in awaited if rank not in waits_for)
    if not waits_for:  # nobody makes progress, and nobody is in a communication
        longest = max((state.idle_seconds for state in states.values()), default=0.0)
        culprits = sorted(rank for rank, state in states.items() if state.idle_seconds > 0.5 * longest)
    return Findings(
        culprits=culprits or silent,
        silent=silent,
        waits_for=waits_for,
        disagreements=[] if culprits else _disagreements(states),
        circle=[] if culprits or silent else _circle(waits_for),
    )


def _awaited(rank: int, wait: Wait, states: Mapping[int, RankState]) -> set[int]:
    """Return who has not made the call; if all have, who is still held up by an earlier one."""
    others = [member for member in wait.ranks if member != rank]
    missing = {
        member for member in others if member not in states or states[member].calls.get(wait.channel, 0) < wait.number
    }
    return missing or {member for member in others if _is_held_up(states[member], wait)}


def _is_held_up(member: RankState, wait: Wait) -> bool:
    """Whether a member has the call still before it on its GPU, behind one that it waits in."""
    own = member.wait
    return own is not None and own.channel != wait.channel and member.calls.get(wait.channel, 0) == wait.number


def _disagreements(states: Mapping[int, RankState]) -> list[str]:
    said: dict[tuple[str, int], dict[str, list[int]]] = {}
    for rank, state in sorted(states.items()):
        wait = state.wait
        if wait is not None and wait.signature:
            said.setdefault((wait.channel, wait.number), {}).setdefault(wait.signature, []).append(rank)
    return [
        ", but ".join(f"{describe_ranks(ranks)}: {states[ranks[0]].wait}" for ranks in calls.values())
        for calls in said.values()
        if len(calls) > 1
    ]


def _circle(waits_for: Mapping[int, list[int]]) -> list[int]:
    for start in waits_for:
        path = [start]
        while (following := next(iter(waits_for.get(path[-1], [])), None)) is not None:
            if following in path:
                return path[path.index(following) :]
            path.append(following)
    return []


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
    """Without progress on the rank that asked."""
    layout: ParallelLayout
    findings: Findings
    states: Mapping[int, RankState]
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
            waits = "; ".join(f"{self._names([rank])} waits in {self.states[rank].wait}" for rank in found.circle)
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
            if rank in self.states:
                lines += [f"Python stack of {self._names([rank])}, innermost last:"]
                lines += [f"  {frame}" for frame in self.states[rank].stack]
        lines.append(
            f"Asked by rank {self.asked_by} after {self.seconds:.1f} s without progress; "
            f"{len(self.states)} of {self.layout.world} ranks answered. Longer times are allowed with "
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
        place, state = self.places.get(rank), self.states.get(rank)
        coordinates = self.layout.coordinates(rank)
        return {
            "rank": rank,
            "stage": coordinates.pp,
            "coordinates": asdict(coordinates),
            "host": place and place.host,
            "pid": place and place.pid,
            "process": place and place.note,
            "answered": state is not None,
            **(asdict(state) if state else {}),
        }

    def _culprit(self, rank: int) -> str:
        return f"{self._names([rank])}{self._at(rank)} {self._doing(rank)}{self._awaited_in(rank)}"

    def _at(self, rank: int) -> str:
        place = self.places.get(rank)
        return f" on {place.host}, pid {place.pid}," if place else ""

    def _doing(self, rank: int) -> str:
        state = self.states.get(rank)
        if state is None:
            place = self.places.get(rank)
            return f"does not answer{f' ({place.note})' if place and place.note else ''}"
        frame = state.stack[-1] if state.stack else "an unknown place"
        idle = f"{state.idle_seconds:.1f} s without progress"
        return f"is not in a communication but at {frame}, {idle}, in {state.phase}"

    def _awaited_in(self, rank: int) -> str:
        """Say who waits in which calls, those of the smallest groups first: they say most about what is missing."""
        waiting: dict[str, list[int]] = {}
        for other, awaited in self.findings.waits_for.items():
            if rank in awaited:
                waiting.setdefault(str(self.states[other].wait), []).append(other)
        calls = sorted(waiting, key=lambda call: len(self._members(waiting[call][0])))
        named = [f"{self._names(waiting[call])} in {call}" for call in calls[:_CALLS]]
        return f"; waiting for it: {', and '.join(named)}" if named else ""

    def _members(self, rank: int) -> list[int]:
        wait = self.states[rank].wait
        return wait.ranks if wait else []

    def _names(self, ranks: list[int]) -> str:
        stages = sorted({self.layout.coordinates(rank).pp for rank in ranks})
        plural = "s" if len(stages) > 1 else ""
        return f"{describe_ranks(ranks)} (stage{plural} {', '.join(map(str, stages))})"

    def _waiting(self) -> list[str]:
        lines = []
        for rank, awaited in list(self.findings.waits_for.items())[:_LISTED]:
            state = self.states[rank]
            assert state.wait is not None
            for_whom = f" for {describe_ranks(awaited)}" if awaited else ""
            lines.append(
                f"  {self._names([rank])} has waited {state.idle_seconds:.1f} s{for_whom} in {state.wait}, call "
                f"{state.wait.number} there, in {state.phase}"
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
