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
_CULPRITS = 4
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
    silent = [rank for rank in range(world) if rank not in states]
    waits = {rank: state.wait for rank, state in sorted(states.items()) if state.wait is not None}
    waits_for = {rank: sorted(_awaited(rank, wait, states)) for rank, wait in waits.items()}
    culprits = sorted({rank for ranks in waits_for.values() for rank in ranks} - waits.keys())
    if not waits:  # nobody makes progress, and nobody is in a communication
        longest = max((state.idle_seconds for state in states.values()), default=0.0)
        culprits = sorted(rank for rank, state in states.items() if state.idle_seconds > 0.5 * longest)
    return Findings(
        culprits=culprits or silent,
        silent=silent,
        waits_for=waits_for,
        disagreements=[] if culprits else _disagreements(waits),
        circle=[] if culprits or silent else _circle(waits_for),
    )


def _awaited(rank: int, wait: Wait, states: Mapping[int, RankState]) -> set[int]:
    """Return who has not made the call; if all have, who has it still before it on its GPU, held up by another."""
    members = {member: states.get(member) for member in wait.ranks if member != rank}
    made = {member: state.calls.get(wait.channel, 0) if state else 0 for member, state in members.items()}
    missing = {member for member in members if made[member] < wait.number}
    held_up = {
        member
        for member, state in members.items()
        if state and state.wait and state.wait.channel != wait.channel and made[member] == wait.number
    }
    return missing or held_up


def _disagreements(waits: Mapping[int, Wait]) -> list[str]:
    said: dict[tuple[str, int], dict[str, list[int]]] = {}
    for rank, wait in waits.items():
        if wait.signature:
            said.setdefault((wait.channel, wait.number), {}).setdefault(wait.signature, []).append(rank)
    return [
        ", but ".join(f"{describe_ranks(ranks)}: {waits[ranks[0]]}" for ranks in calls.values())
        for calls in said.values()
        if len(calls) > 1
    ]


def _circle(waits_for: Mapping[int, list[int]]) -> list[int]:
    for start in waits_for:
        path = [start]
        while following := waits_for.get(path[-1]):
            if following[0] in path:
                return path[path.index(following[0]) :]
            path.append(following[0])
    return []


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs: the start time tells its process from a later one with its number."""

    host: str
    pid: int
    started: str = ""
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
        found = self.findings
        if found.culprits:
            named = "; ".join(self._culprit(rank) for rank in found.culprits[:_CULPRITS])
            more = len(found.culprits) - _CULPRITS
            return f"the job hangs: {named}" + (f"; and {more} more" if more > 0 else "")
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
        lines = [self.headline()]
        for rank, awaited in list(self.findings.waits_for.items())[:_LISTED]:
            state = self.states[rank]
            for_whom = f" for {describe_ranks(awaited)}" if awaited else ""
            number = f", call {state.wait.number} there" if state.wait else ""
            lines.append(
                f"  {self._names([rank])} has waited {state.idle_seconds:.1f} s{for_whom} in {state.wait}{number}, in "
                f"{state.phase}"
            )
        if (more := len(self.findings.waits_for) - _LISTED) > 0:
            lines.append(f"  and {more} more ranks wait; see {JSON_FILE}")
        for rank in (*self.findings.culprits, *self.findings.circle):
            if rank in self.states:
                lines.append(f"Python stack of {self._names([rank])}, innermost last:")
                lines += [f"  {frame}" for frame in self.states[rank].stack]
        lines.append(
            f"Asked by rank {self.asked_by} after {self.seconds:.1f} s without progress; "
            f"{len(self.states)} of {self.layout.world} ranks answered. Longer times are allowed with "
            "runtime.timeout_seconds."
        )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "headline": self.headline(),
            "time": time.time(),
            "asked_by": self.asked_by,
            "seconds_without_progress": round(self.seconds, 3),
            **asdict(self.findings),
            "ranks": [self._rank_as_json(rank) for rank in range(self.layout.world)],
        }

    def _rank_as_json(self, rank: int) -> dict[str, Any]:
        place, state, coordinates = self.places.get(rank), self.states.get(rank), self.layout.coordinates(rank)
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
        """Say where a rank is, what it does, and who waits for it; the calls of the smallest groups say most."""
        place, state = self.places.get(rank), self.states.get(rank)
        said = self._names([rank]) + (f" on {place.host}, pid {place.pid}," if place else "")
        if state is None:
            said += f" does not answer{f' ({place.note})' if place and place.note else ''}"
        else:
            said += f" is not in a communication but at {state.stack[-1]}, {state.idle_seconds:.1f} s without progress"
            said += f", in {state.phase}"
        waiting: dict[tuple[int, str], list[int]] = {}
        for other, awaited in self.findings.waits_for.items():
            if rank in awaited and (wait := self.states[other].wait):
                waiting.setdefault((len(wait.ranks), str(wait)), []).append(other)
        calls = sorted(waiting.items(), key=lambda item: item[0][0])[:_CALLS]
        named = ", and ".join(f"{self._names(others)} in {call}" for (_, call), others in calls)
        return said + (f"; waiting for it: {named}" if named else "")

    def _names(self, ranks: list[int]) -> str:
        stages = sorted({self.layout.coordinates(rank).pp for rank in ranks})
        return f"{describe_ranks(ranks)} (stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))})"


def write_report(directory: Path, report: HangReport) -> None:
    from conversion.atomic_file import write_small

    directory.mkdir(parents=True, exist_ok=True)
    write_small(directory / TEXT_FILE, report.text() + "\n")
    write_small(directory / JSON_FILE, json.dumps(report.as_json(), indent=1) + "\n")
