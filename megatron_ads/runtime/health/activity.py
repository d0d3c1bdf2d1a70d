"""What this rank is doing: its step, the communications it has made, the one it waits in, and for how long it waited.

Other threads may ask for ``activity.state()`` at any time. Ranks count their calls by channel, a name that all who take
part in a call share: a process group for collectives, two ranks of it and a direction for messages. A rank that has
made fewer calls on a channel than the number of the call that another rank waits in has not reached that call.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
import traceback
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Work
from torch.distributed import ProcessGroup

from megatron_ads.errors import MegatronAdsError
from megatron_ads.layout import ParallelLayout, describe_ranks
from megatron_ads.runtime.health.calls import Call, Group

_REMEMBERED = 256
"""Calls looked through for unfinished ones: more than are ever under way at once."""
_FRAMES = 40
_SIGNS = ("gloo", "Timed out", "timed out", "timeout", "Connection closed by peer", "Connection reset by peer")
"""Of torch's errors about communication."""
_METHODS = (
    "_allgather_base", "_reduce_scatter_base", "all_gather_single", "all_gather_single_coalesced", "all_to_all_single",
    "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "allreduce", "allreduce_coalesced",
    "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "monitored_barrier", "recv", "recv_anysource",
    "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced", "scatter", "send",
)  # fmt: skip
"""Communicating methods of ``ProcessGroup`` in torch 2.13; versions that lack some of them have fewer to record."""
_END_OF_BATCH = "_end_coalescing"


class CommunicationError(MegatronAdsError, RuntimeError):
    """A communication did not finish: a peer has died, or some ranks of a group made another call than the rest."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A communication that a rank has begun and not finished."""

    call: str
    """Operation, tensors and details."""
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
class RankState:
    """The current state of a rank, as it reports it to the others."""

    phase: str
    idle_seconds: float
    """Since it last began or finished a communication or a step."""
    wait: Wait | None
    """None while it is not in a communication."""
    calls: dict[str, int]
    """Made so far, by channel."""
    stack: list[str]
    """Python frames of the thread that trains, innermost last: ``file:line in function``."""


class Stalls:
    """How long this rank's computation has waited for communication.

    All ranks of a synchronous job take equally long for a step: the slow one computes while the others wait for it.
    What sets it apart is the time that it does not wait. With gloo the host itself waits. On a GPU the host runs ahead
    and the stream of the computation waits, so events in that stream, before and after each wait, take the time.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._entered = 0.0
        self._before: torch.cuda.Event | None = None
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.restart(measured=False)

    def restart(self, *, measured: bool) -> None:
        """Forget the waits so far; ``measured`` says whether ``seconds`` will be asked for those to come."""
        self._seconds, self._measured = 0.0, measured
        self._pairs.clear()

    def enter(self) -> None:
        self._entered = time.monotonic()
        self._before = _mark(timed=True) if self._on_gpu and self._measured else None

    def leave(self) -> torch.cuda.Event | None:
        """End the wait; on a GPU, return an event that the stream reaches when the communication is over."""
        if not self._on_gpu:
            self._seconds += time.monotonic() - self._entered
            return None
        event = _mark(timed=self._before is not None)
        if self._before is not None:
            self._pairs.append((self._before, event))
        return event

    def seconds(self) -> float:
        """Return the waits since ``restart``; on a GPU, the host waits for the stream to have come that far."""
        if self._pairs:
            self._pairs[-1][1].synchronize()
        return self._seconds + sum(before.elapsed_time(after) for before, after in self._pairs) / 1000


def _mark(*, timed: bool) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=timed)
    event.record()
    return event


class Activity:
    """The records of one rank. The thread that makes it is the one whose stack is reported."""

    def __init__(self, *, on_gpu: bool = False) -> None:
        self.stalls = Stalls(on_gpu=on_gpu)
        self.phase = "setting up"
        self.in_step = False
        self._on_gpu = on_gpu
        self._thread = threading.get_ident()
        self._done = 0
        self._moved = time.monotonic()
        self._calls: deque[Call] = deque(maxlen=_REMEMBERED)
        self._counts: Counter[str] = Counter()
        self._batch: list[Call] = []
        """Calls that will share a handle."""
        self._groups: dict[str, Group] = {}
        self._inside: list[Call | None] = []
        """Calls that the host is inside of, in the call itself or waiting on its handle."""

    def enter_step(self, step: int) -> None:
        self.phase, self.in_step = f"step {step}", True
        self.moved()

    def leave_step(self, step: int) -> None:
        """Record that ``step`` has ended; what follows it (validation, saving, export) may take its time."""
        self.phase, self.in_step = f"after step {step}", False
        self.moved()

    def moved(self) -> None:
        self._done += 1
        self._moved = time.monotonic()

    def progress(self) -> object:
        """Return what changes with everything that this rank gets done; on a GPU, of what it waits for."""
        oldest = self._oldest_unfinished()
        return self._done if oldest is None else (oldest.channel, oldest.number)

    def idle_seconds(self) -> float:
        oldest = self._oldest_unfinished()
        return time.monotonic() - (self._moved if oldest is None else oldest.begun)

    def is_waiting(self) -> bool:
        return bool(self._inside) or self._oldest_unfinished() is not None

    def state(self) -> RankState:
        """Return the current state; any thread may ask."""
        inside = list(self._inside)
        call = self._oldest_unfinished() if self._on_gpu else inside[-1] if inside else None
        wait = None if call is None else _as_wait(call)
        if inside and wait is None:
            wait = Wait("a communication", "an unknown group", [], "", 0, "")
        return RankState(
            phase=self.phase,
            idle_seconds=round(self.idle_seconds(), 3),
            wait=wait,
            calls=dict(self._counts),
            stack=self._stack(),
        )

    def _stack(self) -> list[str]:
        """Return the frames of the thread, with each file's path below the folder of packages or of the program."""
        lines = deque[str]()
        for frame, line in itertools.islice(traceback.walk_stack(sys._current_frames()[self._thread]), _FRAMES):
            names = (frame.f_code.co_filename.removeprefix(folder + os.sep) for folder in sys.path if folder)
            lines.appendleft(f"{min(names, key=len)}:{line} in {frame.f_code.co_name}")
        return list(lines)

    def describe(self, rank: int) -> str:
        """Name the calls that have not succeeded, oldest first, and the ranks that they needed."""
        unfinished = [call for call in self._calls if call.is_unfinished()] or list(self._calls)[-1:]
        if not unfinished:
            return "a communication that torch was setting up"
        named = dict.fromkeys(str(_as_wait(call)) for call in unfinished)
        peers = {peer for call in unfinished for peer in call.group.ranks} - {rank}
        return f"{', then '.join(named)}; look at the logs of {describe_ranks(list(peers))}"

    def begin(self, group: ProcessGroup, operation: str, arguments: Sequence[Any]) -> None:
        if (name := group.group_name) not in self._groups:
            self._groups[name] = Group.of(group)
        call = Call.of(self._groups[name], operation, arguments)
        ends = call.ends()
        call.channel = f"{name} {ends[0]}>{ends[1]}" if ends else name
        self._counts[call.channel] += 1
        call.number, call.begun = self._counts[call.channel], time.monotonic()
        self._calls.append(call)
        self._enter(call)

    def issued(self, operation: str, work: Any) -> None:
        """Remember the handle that the latest call returned: None if it is over, or part of a coalesced batch."""
        self._leave()
        if work is not None:
            self._calls[-1].work = weakref.ref(work)
        elif operation == "monitored_barrier":
            self._calls.pop()
        else:
            self._batch.append(self._calls[-1])

    def batch_issued(self, work: Any) -> None:
        """Remember the handle of all calls that were coalesced (NCCL does) since the last batch."""
        for call in self._batch:
            call.work = None if work is None else weakref.ref(work)
        self._batch.clear()

    def wait_begins(self, work: Any) -> None:
        """Note which call the host, or the stream on a GPU, waits for from here on."""
        self._enter(next((call for call in reversed(self._calls) if call.work and call.work() is work), None))

    def wait_ends(self) -> None:
        call = self._inside[-1] if self._inside else None
        event = self._leave()
        if event is not None and call is not None:
            for each in self._calls:
                if each.work is call.work:  # a reference that all calls of a batch share
                    each.finished = event

    def _enter(self, call: Call | None) -> None:
        self._inside.append(call)
        if len(self._inside) == 1:
            self.stalls.enter()
        self.moved()

    def _leave(self) -> torch.cuda.Event | None:
        if self._inside:
            self._inside.pop()
        self.moved()
        return None if self._inside else self.stalls.leave()

    def _oldest_unfinished(self) -> Call | None:
        """Return, on a GPU, the call that the stream waits in; elsewhere the host itself waits."""
        if not self._on_gpu:
            return None
        return next((call for call in list(self._calls) if call.is_unfinished()), None)


def _as_wait(call: Call) -> Wait:
    ranks = list(call.ends() or call.group.ranks)
    return Wait(str(call), str(call.group), ranks, call.channel, call.number, call.signature())


@contextlib.contextmanager
def observed(activity: Activity) -> Iterator[None]:
    """Record every communication of this process in ``activity`` inside the context.

    Calls are seen at torch's ``ProcessGroup`` methods, below all names that torch and Megatron-Core have for them.
    """
    names = [name for name in (*_METHODS, _END_OF_BATCH) if name in ProcessGroup.__dict__]
    originals = {(ProcessGroup, name): ProcessGroup.__dict__[name] for name in names} | {(Work, "wait"): Work.wait}
    for (owner, name), method in originals.items():
        setattr(owner, name, _recorded(name, method, activity))
    try:
        yield
    finally:
        for (owner, name), method in originals.items():
            setattr(owner, name, method)


def _recorded(name: str, method: Callable[..., Any], activity: Activity) -> Callable[..., Any]:
    def call(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        activity.begin(group, name, (*args, *kwargs.values()))
        work = method(group, *args, **kwargs)
        activity.issued(name, work)
        return work

    def end_batch(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        work = method(group, *args, **kwargs)
        activity.batch_issued(work)
        return work

    def wait(work: Work, *args: Any, **kwargs: Any) -> Any:
        activity.wait_begins(work)
        try:
            return method(work, *args, **kwargs)
        finally:
            activity.wait_ends()

    others: dict[str, Callable[..., Any]] = {_END_OF_BATCH: end_batch, "wait": wait}
    return others.get(name, call)


@contextlib.contextmanager
def name_failed_communication(layout: ParallelLayout, activity: Activity | None = None) -> Iterator[None]:
    """Record communications in ``activity``, and turn torch's error about a timeout or a lost peer into one with names.

    Under gloo a wait that fails ends in an exception here; under NCCL torch's own watchdog ends the process, and the
    peer monitor and NCCL's log have to do.

    Raises:
        CommunicationError: With this rank's coordinates, the unfinished operation, its group and the group's ranks.
    """
    activity = activity or Activity()
    with observed(activity):
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in _SIGNS):
                raise
            rank = dist.get_rank()
            at = layout.coordinates(rank)
            raise CommunicationError(
                f"Rank {rank} (stage {at.pp}, dp {at.dp}, cp {at.cp}, tp {at.tp}, edp {at.edp}, ep {at.ep}) was left "
                f"waiting in {activity.describe(rank)}. torch says: {str(error).splitlines()[0]}"
            ) from error
