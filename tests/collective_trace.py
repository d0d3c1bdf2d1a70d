"""Record which collectives each rank makes in each process group, and find where members of a group disagree.

with trace_collectives() as trace:
    optimizer.step()
mismatches = compare_traces(gathered)          # gathered: {rank: trace}
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.distributed import ProcessGroup

from megatron_ads.runtime.health.activity import Activity, observed
from megatron_ads.runtime.health.calls import POINT_TO_POINT, Call, Group


@dataclass(frozen=True, slots=True)
class Collective:
    """One operation as a member of the group called it."""

    operation: str
    text: str
    signature: str
    """What the calls of all members have in common."""

    def __str__(self) -> str:
        return self.text

    def agrees_with(self, other: "Collective") -> bool:
        """Whether two members may make these calls as one."""
        return self.signature == other.signature


def collective(group: Group, operation: str, arguments: Sequence[Any]) -> Collective:
    """Return the record of a call of ``ProcessGroup`` method ``operation``."""
    call = Call.of(group, operation, arguments)
    return Collective(operation, str(call), call.signature())


@dataclass(slots=True)
class Trace:
    """What one rank called, in order, by group."""

    collectives: dict[Group, list[Collective]] = field(default_factory=dict)
    point_to_point: dict[Group, list[Collective]] = field(default_factory=dict)
    """Sends and receives, which only two members take part in."""

    def count(self) -> int:
        """Return the number of calls, collectives and point-to-point."""
        return sum(len(calls) for part in (self.collectives, self.point_to_point) for calls in part.values())


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first place in the sequence of one group where its members differ."""

    group: Group
    position: int
    """From 0, in the group's sequence of collectives."""
    calls: dict[int, str]
    """What each member called there, by rank; "nothing" where its sequence had ended."""

    def __str__(self) -> str:
        said = "; ".join(f"rank {rank}: {call}" for rank, call in sorted(self.calls.items()))
        return f"collective {self.position} of {self.group}: {said}"


@contextlib.contextmanager
def trace_collectives() -> Iterator[Trace]:
    """Record every call that this process makes until the context ends."""
    recorder = _Recorder()
    with observed(recorder):
        yield recorder.trace


class _Recorder(Activity):
    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()

    def begin(self, group: ProcessGroup, operation: str, arguments: Sequence[Any]) -> None:
        super().begin(group, operation, arguments)
        part = self.trace.point_to_point if operation in POINT_TO_POINT else self.trace.collectives
        named = Group.of(group)
        part.setdefault(named, []).append(collective(named, operation, arguments))


def compare_traces(traces: Mapping[int, Trace]) -> list[Mismatch]:
    """Return, for each group whose members made different sequences, the first difference.

    Args:
        traces: The trace of every rank of the job, by rank. A member without any call in a group made none.
    """
    groups = sorted({group for trace in traces.values() for group in trace.collectives})
    found = (_first_difference(group, {rank: traces[rank].collectives.get(group, []) for rank in group.ranks})
             for group in groups)  # fmt: skip
    return [mismatch for mismatch in found if mismatch]


def _first_difference(group: Group, calls: Mapping[int, list[Collective]]) -> Mismatch | None:
    for position in range(max(map(len, calls.values()))):
        here = {rank: made[position] if position < len(made) else None for rank, made in calls.items()}
        first, *others = here.values()
        if first is None or not all(other is not None and first.agrees_with(other) for other in others):
            return Mismatch(group, position, {rank: str(call or "nothing") for rank, call in here.items()})
    return None
