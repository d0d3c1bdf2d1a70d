"""From where every rank stands to the ranks that the others wait for.

A rank in a communication waits for those who must make the same call and have not: they have made fewer calls on its
channel. Among these, the ones that wait for others themselves are victims too; what remains is the cause.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_ads.runtime.health.activity import Standing, Wait
from megatron_ads.runtime.rank_ranges import describe_ranks


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


def find(standings: Mapping[int, Standing], world: int) -> Findings:
    """Return the findings from the standings of those who answered, by rank."""
    silent = [rank for rank in range(world) if rank not in standings]
    waits_for = {
        rank: sorted(_awaited(rank, standing.wait, standings))
        for rank, standing in sorted(standings.items())
        if standing.wait is not None
    }
    awaited = {rank for ranks in waits_for.values() for rank in ranks}
    culprits = sorted(rank for rank in awaited if rank not in waits_for)
    if not waits_for:  # everybody stands still outside communication
        longest = max((standing.idle_seconds for standing in standings.values()), default=0.0)
        culprits = sorted(rank for rank in standings if standings[rank].idle_seconds > 0.5 * longest)
    return Findings(
        culprits=culprits or silent,
        silent=silent,
        waits_for=waits_for,
        disagreements=[] if culprits else _disagreements(standings),
        circle=[] if culprits or silent else _circle(waits_for),
    )


def _awaited(rank: int, wait: Wait, standings: Mapping[int, Standing]) -> set[int]:
    """Return who has not made the call; if all have, who is still held up by an earlier one."""
    others = [member for member in wait.ranks if member != rank]
    missing = {
        member
        for member in others
        if member not in standings or standings[member].calls.get(wait.channel, 0) < wait.number
    }
    return missing or {member for member in others if _is_held_up(standings[member], wait)}


def _is_held_up(member: Standing, wait: Wait) -> bool:
    """Whether a member has the call still before it on its GPU, behind one that it waits in."""
    own = member.wait
    return own is not None and own.channel != wait.channel and member.calls.get(wait.channel, 0) == wait.number


def _disagreements(standings: Mapping[int, Standing]) -> list[str]:
    said: dict[tuple[str, int], dict[str, list[int]]] = {}
    for rank, standing in sorted(standings.items()):
        wait = standing.wait
        if wait is not None and wait.signature:
            said.setdefault((wait.channel, wait.number), {}).setdefault(wait.signature, []).append(rank)
    return [
        ", but ".join(f"{describe_ranks(ranks)}: {standings[ranks[0]].wait}" for ranks in calls.values())
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
