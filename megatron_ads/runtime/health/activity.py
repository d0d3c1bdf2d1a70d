"""What this rank is doing: its step, the communications it has made, the one it waits in, and for how long it waited.

    activity = Activity()
    with activity.observed():
        activity.enter_step(12)
        ...                                     # the step
        own_work = step_seconds - activity.stalls.seconds()

Other threads may ask ``activity.standing()`` at any time. Ranks count their calls by channel, a name that all who take
part in a call share: a process group for collectives, two ranks of it and a direction for messages. Who has made fewer
calls on a channel than the number of the call that another rank waits in has not come to it.
"""

import contextlib
import os
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron_ads.runtime.health.calls import (
    POINT_TO_POINT,
    Collective,
    Group,
    describe_call,
    describe_group,
    intercept,
)
from megatron_ads.runtime.stalls import CpuStalls, CudaStalls

_REMEMBERED = 256
"""Calls looked through for unfinished ones: more than are ever under way at once."""
_FRAMES = 40


@dataclass(frozen=True, slots=True)
class Wait:
    """A communication that a rank has begun and not finished."""

    call: str
    """Operation, tensors and details, as ``Collective`` prints them."""
    group: str
    ranks: list[int]
    """Of those who must make the call."""
    channel: str
    number: int
    """Of the call on its channel, from 1."""
    signature: str
    """What all members of the group must have in common; empty for a message."""

    def __str__(self) -> str:
        return f"{self.call} of {self.group}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a rank stands, as it tells the others."""

    phase: str
    idle_seconds: float
    """Since it last began or finished a communication or a step."""
    wait: Wait | None
    """None while it is not in a communication."""
    calls: dict[str, int]
    """Made so far, by channel."""
    stack: list[str]
    """Python frames of the thread that trains, innermost last: ``file:line in function``."""


@dataclass(slots=True)
class _Handle:
    """What a call returned to wait on; the calls of a coalesced batch share one."""

    work: weakref.ref[Any]
    """Dies when nobody waits any more."""
    finished: torch.cuda.Event | None = None
    """On a GPU: behind the wait in the stream of the computation, which the host does not wait for."""

    def is_done(self) -> bool:
        if self.finished is not None:
            return self.finished.query()
        work = self.work()
        return work is None or (work.is_completed() and work.exception() is None)


@dataclass(slots=True)
class _Call:
    group: Group
    call: Collective
    channel: str
    number: int
    ranks: tuple[int, ...]
    begun: float
    handle: _Handle | None = None
    """None until the call has returned one."""

    def is_unfinished(self) -> bool:
        return self.handle is None or not self.handle.is_done()

    def as_wait(self) -> Wait:
        signature = self.call.signature() if self.call.operation not in POINT_TO_POINT else ""
        return Wait(str(self.call), str(self.group), list(self.ranks), self.channel, self.number, signature)

    def __str__(self) -> str:
        return f"{self.call} of {self.group}"


class Activity:
    """The records of one rank. The thread that makes it is the one whose stack is told."""

    def __init__(self, *, on_gpu: bool = False) -> None:
        self.stalls: CpuStalls | CudaStalls = CudaStalls() if on_gpu else CpuStalls()
        self._done = 0
        self.phase = "setting up"
        self.in_step = False
        self._on_gpu = on_gpu
        self._thread = threading.get_ident()
        self._moved = time.monotonic()
        self._calls: deque[_Call] = deque(maxlen=_REMEMBERED)
        self._counts: Counter[str] = Counter()
        self._batch: list[_Call] = []
        """Calls that will share a handle."""
        self._groups: dict[str, Group] = {}
        self._inside: list[_Call | None] = []
        """Calls that the host is inside of, in the call itself or waiting on its handle."""

    @contextlib.contextmanager
    def observed(self) -> Iterator[None]:
        """See every communication of this process inside the context."""
        with intercept(
            before=self.begin,
            after=self.issued,
            after_batch=self.batch_issued,
            before_wait=self.wait_begins,
            after_wait=self.wait_ends,
        ):
            yield

    def enter_step(self, step: int) -> None:
        """Say that ``step`` begins."""
        self.phase, self.in_step = f"step {step}", True
        self.moved()

    def leave_step(self, step: int) -> None:
        """Say that ``step`` has ended; what follows it (validation, saving, export) may take its time."""
        self.phase, self.in_step = f"after step {step}", False
        self.moved()

    def moved(self) -> None:
        """Count something as done."""
        self._done += 1
        self._moved = time.monotonic()

    def progress(self) -> object:
        """Return what changes with everything that this rank gets done; on a GPU, of what it waits for."""
        oldest = self._oldest_unfinished() if self._on_gpu else None
        return self._done if oldest is None else (oldest.channel, oldest.number)

    def idle_seconds(self) -> float:
        """Return the time since the last progress."""
        oldest = self._oldest_unfinished() if self._on_gpu else None
        return time.monotonic() - (self._moved if oldest is None else oldest.begun)

    def is_waiting(self) -> bool:
        """Whether this rank is in a communication."""
        return bool(self._inside) or (self._on_gpu and self._oldest_unfinished() is not None)

    def begin(self, group: ProcessGroup, operation: str, arguments: Sequence[Any]) -> None:
        """Remember a call that is about to be made."""
        named = self._groups.get(group.group_name)
        if named is None:
            named = self._groups[group.group_name] = describe_group(group)
        channel, ranks = _channel(group, named, operation, arguments)
        self._counts[channel] += 1
        described = describe_call(named, operation, arguments)
        call = _Call(named, described, channel, self._counts[channel], ranks, time.monotonic())
        self._calls.append(call)
        self._enter(call)

    def issued(self, group: ProcessGroup, operation: str, arguments: Sequence[Any], work: Any) -> None:
        """Remember the handle that the latest call returned; none if it is over, or part of a coalesced batch."""
        self._leave()
        call = self._calls[-1]
        if work is not None:
            call.handle = _Handle(weakref.ref(work))
        elif operation == "monitored_barrier":
            self._calls.pop()
        else:
            self._batch.append(call)

    def batch_issued(self, work: Any) -> None:
        """Remember the handle of the calls that were made since the last batch."""
        if work is not None:
            handle = _Handle(weakref.ref(work))
            for call in self._batch:
                call.handle = handle
        self._batch.clear()

    def wait_begins(self, work: Any) -> None:
        """Note that the host, or the stream on a GPU, waits for a call from here on."""
        self._enter(next((call for call in reversed(self._calls) if call.handle and call.handle.work() is work), None))

    def wait_ends(self, work: Any) -> None:
        """Note the end of the wait."""
        call = self._inside[-1] if self._inside else None
        event = self._leave()
        if call is not None and call.handle is not None:
            call.handle.finished = event

    def describe(self, rank: int) -> str:
        """Name the calls that have not succeeded, oldest first, and the ranks that they needed."""
        unfinished = [call for call in self._calls if call.is_unfinished()] or list(self._calls)[-1:]
        if not unfinished:
            return "a communication that torch was setting up"
        named = dict.fromkeys(map(str, unfinished))
        peers = sorted({peer for call in unfinished for peer in call.group.ranks} - {rank})
        whose = f"rank{'s' if len(peers) > 1 else ''} {', '.join(map(str, peers))}"
        return f"{', then '.join(named)}; look at the logs of {whose}"

    def standing(self) -> Standing:
        """Return where this rank stands; any thread may ask."""
        inside = list(self._inside)
        call = self._oldest_unfinished() if self._on_gpu else inside[-1] if inside else None
        wait = None if call is None else call.as_wait()
        if inside and wait is None:
            wait = Wait("a communication", "an unknown group", [], "", 0, "")
        return Standing(
            phase=self.phase,
            idle_seconds=round(self.idle_seconds(), 3),
            wait=wait,
            calls=dict(self._counts),
            stack=_stack(self._thread),
        )

    def _enter(self, call: _Call | None) -> None:
        self._inside.append(call)
        if len(self._inside) == 1:
            self.stalls.enter()
        self.moved()

    def _leave(self) -> torch.cuda.Event | None:
        if self._inside:
            self._inside.pop()
        self.moved()
        return None if self._inside else self.stalls.leave()

    def _oldest_unfinished(self) -> _Call | None:
        return next((call for call in list(self._calls) if call.is_unfinished()), None)


def _channel(
    group: ProcessGroup, named: Group, operation: str, arguments: Sequence[Any]
) -> tuple[str, tuple[int, ...]]:
    """Return the name under which all who take part count a call, and who they are."""
    name = f"{group.group_name} {named.name}"
    if operation not in ("send", "recv"):
        return name, named.ranks
    here, there = named.ranks[group.rank()], named.ranks[arguments[1]]
    source, target = (here, there) if operation == "send" else (there, here)
    return f"{name} {source}>{target}", (source, target)


def _stack(thread: int) -> list[str]:
    frame: FrameType | None = sys._current_frames().get(thread)
    lines: list[str] = []
    while frame is not None and len(lines) < _FRAMES:
        code = frame.f_code
        lines.append(f"{_short(code.co_filename)}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back
    return lines[::-1]


def _short(path: str) -> str:
    """Return a file's path below the folder of packages or of the program."""
    for folder in sorted(sys.path, key=len, reverse=True):
        if folder and path.startswith(folder + os.sep):
            return path[len(folder) + 1 :]
    return path
