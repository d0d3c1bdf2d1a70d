"""Find out, when nothing moves any more, which rank the others wait for; report it and end the job.

A rank that has made no progress for nearly the job's timeout, in a communication or within a step, asks around the
``ring``. Every rank answers with its current state, back along the way the question came, so that one that does not
answer cuts nobody off. The rank that asked makes the report and makes all ranks end, unless it moves on meanwhile.
Silent ranks may divide the ring: each part makes its own report, and the last one is kept.

All of this happens in the thread of the peer monitor, which answers while the training thread waits or sleeps, in
Python or in C. It cannot in a stopped process, nor while C code holds the interpreter lock: such a rank is reported as
not answering, and in the second case ``faulthandler``, which needs no lock, writes its stacks to its own output.

Where torch records communication itself (``TORCH_FR_BUFFER_SIZE``; ``TORCH_NCCL_TRACE_BUFFER_SIZE`` before 2.13), every
rank that can leaves its record, a pickle, as ``flight_RANK`` next to the report. ``torchfrtrace FOLDER --prefix
flight_`` is made for those of NCCL; it loads those of gloo, but its analysis fails in torch 2.13.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime.health.activity import Activity, RankState
from megatron_ads.runtime.health.report import HangReport, Place, find, write_report
from megatron_ads.runtime.health.ring import PeerLink, tell

logger = logging.getLogger(__name__)

_LONGEST_MARGIN = 10.0
_WRITING_SECONDS = 10.0
"""How long writing the report may take: the file system may be what hangs."""
_SLEPT_LONGER = 2.0
"""Seconds by which waking up late shows that the process was stopped (Ctrl-Z, a suspended machine)."""
_PROCESS_STATES = {
    "T": "its process is stopped",
    "t": "its process is stopped by a debugger",
    "D": "its process is stuck in the kernel, as in a read or write of a disk or a network file system",
    "R": "its process is busy in C code that keeps the interpreter lock",
    "S": "its process sleeps in C code that keeps the interpreter lock",
    "Z": "its process has died",
}
_FLIGHT_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")


def _own_place() -> Place:
    return Place(socket.gethostname(), os.getpid(), _process_state(os.getpid())[1])


def _process_state(pid: int) -> tuple[str, str]:
    """Return the kernel's letter for what a process does, and when it was started; empty if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one rank knows, for the question ``number`` of the rank ``asker``."""

    asker: int
    number: int
    rank: int
    place: Place
    state: RankState
    neighbours: dict[int, Place]


@dataclass(slots=True)
class _Inquiry:
    """A question that this rank has asked."""

    number: int
    progress: object
    """Of this rank, when it asked."""
    deadline: float
    answers: dict[int, _Answer] = field(default_factory=dict)


class HangWatch:
    """What the peer monitor needs to know about hangs; all methods but ``__init__`` run in its thread."""

    def __init__(
        self,
        activity: Activity,
        layout: ParallelLayout,
        rank: int,
        *,
        timeout_seconds: float,
        directory: Path,
        on_hang: Callable[[str], None] = lambda headline: None,
    ) -> None:
        """Prepare to report, into ``directory``, a rank without progress, before ``timeout_seconds`` are over.

        ``on_hang`` is called with the report's headline before the process ends.
        """
        margin = min(_LONGEST_MARGIN, timeout_seconds / 4)
        self._activity = activity
        self._layout = layout
        self._rank = rank
        self._limit = timeout_seconds - margin
        self._answer_seconds = margin / 2
        self._directory = directory
        self._on_hang = on_hang
        self._links: Sequence[PeerLink] = ()
        self._neighbours: dict[int, Place] = {}
        self._inquiry: _Inquiry | None = None
        self._asked = 0
        self._heard: set[tuple[int, int]] = set()
        """Questions of others: who asked, and its number."""
        self._others_ask_until = 0.0
        self._wake_at = self._stacks_at = 0.0
        """When this thread wants to run again, and when stacks are written because it could not."""
        self._stack_delay = max(1.0, self._answer_seconds / 2)

    def start(self, links: Sequence[PeerLink]) -> None:
        """Introduce this process to its neighbours."""
        self._links = links
        tell(links, "hello", _own_place())

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    def seconds_to_sleep(self) -> float:
        """Return after how long ``look`` wants to be called."""
        now = time.monotonic()
        if self._inquiry is not None:
            seconds = self._inquiry.deadline - now
        else:
            seconds = max(self._limit - self._activity.idle_seconds(), self._others_ask_until - now)
        if seconds <= 0:
            seconds = self._limit / 10  # idle for long, but free to be
        self._wake_at = now + seconds
        if self._wake_at > self._stacks_at - self._stack_delay / 2:
            self._stacks_at = self._wake_at + self._stack_delay
            faulthandler.dump_traceback_later(self._stacks_at - now, file=sys.__stderr__ or sys.stderr)
        return seconds

    def look(self) -> str | None:
        """Ask, or conclude, if it is time to; return the headline of the report that ends the job."""
        now = time.monotonic()
        if now > self._wake_at + _SLEPT_LONGER:
            self._activity.moved()
        if self._inquiry is not None:
            return self._conclude(self._inquiry, now)
        must_move = self._activity.in_step or self._activity.is_waiting()
        if must_move and self._activity.idle_seconds() >= self._limit and now >= self._others_ask_until:
            self._asked += 1
            self._inquiry = _Inquiry(self._asked, self._activity.progress(), now + self._answer_seconds)
            self._inquiry.answers[self._rank] = self._own_answer(self._rank, self._asked)
            tell(self._links, "inquiry", (self._rank, self._asked))
        return None

    def hear(self, kind: str, content: Any, link: PeerLink) -> None:
        """Handle a message of the kinds ``hello``, ``inquiry`` and ``answer``."""
        if kind == "hello":
            self._neighbours[link.rank] = content
        elif kind == "inquiry":
            self._answer(content, link)
        elif content.asker != self._rank:
            tell(self._links, kind, content, except_for=link)  # back to where the question came from
        elif self._inquiry is not None and content.number == self._inquiry.number:
            self._inquiry.answers[content.rank] = content

    def ends(self, headline: str) -> None:
        """Record the end of this process, and leave what torch recorded."""
        _write(lambda: self._on_hang(headline))
        _write(self._write_flight_record)

    def _write_flight_record(self) -> None:
        if any(os.environ.get(name, "0") not in ("", "0") for name in _FLIGHT_VARIABLES):
            import torch._C._distributed_c10d as c10d

            self._directory.mkdir(parents=True, exist_ok=True)
            record = c10d._dump_fr_trace()  # type: ignore[attr-defined]
            (self._directory / f"flight_{self._rank}").write_bytes(record)

    def _answer(self, question: tuple[int, int], link: PeerLink) -> None:
        """Report the own state, and pass the question on; of several ranks that ask, the lowest continues."""
        asker, number = question
        if asker == self._rank or question in self._heard or (self._inquiry is not None and asker > self._rank):
            return
        self._inquiry = None
        self._others_ask_until = time.monotonic() + 2 * self._answer_seconds
        self._heard.add(question)
        tell(self._links, "inquiry", question, except_for=link)
        link.send("answer", self._own_answer(asker, number))

    def _own_answer(self, asker: int, number: int) -> _Answer:
        seen, own = dict(self._neighbours), _own_place()
        for rank, place in seen.items():  # which may be unable to answer; what it does shows on its own host only
            state, started = _process_state(place.pid) if place.host == own.host else ("", "")
            seen[rank] = replace(place, note=_PROCESS_STATES.get(state, "") if started == place.started else "")
        return _Answer(asker, number, self._rank, own, self._activity.state(), seen)

    def _conclude(self, inquiry: _Inquiry, now: float) -> str | None:
        if self._activity.progress() != inquiry.progress:
            self._inquiry = None
            return None
        if len(inquiry.answers) < self._layout.world and now < inquiry.deadline:
            return None
        states = {rank: answer.state for rank, answer in inquiry.answers.items()}
        places: dict[int, Place] = {}  # what a neighbour sees counts for ranks that did not answer
        for answer in inquiry.answers.values():
            places |= {rank: place for rank, place in answer.neighbours.items() if place.note or rank not in places}
        places |= {rank: answer.place for rank, answer in inquiry.answers.items()}
        report = HangReport(
            asked_by=self._rank,
            seconds=self._activity.idle_seconds(),
            layout=self._layout,
            findings=find(states, self._layout.world),
            states=states,
            places=places,
        )
        logger.critical("%s", report.text())
        _write(lambda: write_report(self._directory, report))
        return report.headline()


def _write(write: Callable[[], None]) -> None:
    """Write in a thread that is left behind if it takes too long."""

    def write_or_say_why_not() -> None:
        try:
            write()
        except OSError as error:
            logger.error("the report of the hang could not be written: %s", error)

    writer = threading.Thread(target=write_or_say_why_not, name="hang report", daemon=True)
    writer.start()
    writer.join(_WRITING_SECONDS)
