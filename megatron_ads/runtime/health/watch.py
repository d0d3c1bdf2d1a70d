"""Find out, when nothing moves any more, which rank the others wait for; report it and end the job.

A rank that has stood still for nearly the job's timeout, in a communication or within a step, asks around the ring of
``peer_links``. Every rank answers with where it stands, back along the way the question came, so that one rank that
does not answer cuts nobody off. The rank that asked makes the report and tells all to end. If it moves on meanwhile,
nothing has happened. With several silent ranks apart from each other, each part of the ring makes its own report, and
the last one stays.

All of this happens in the thread of the peer monitor, which answers while the training thread waits or sleeps, in
Python or in C. It cannot in a stopped process, nor while C code holds the interpreter lock: such a rank is reported as
not answering, and in the second case ``faulthandler``, which needs no lock, writes its stacks to its own output.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime.hang_findings import find
from megatron_ads.runtime.health.activity import Activity, Standing, Wait
from megatron_ads.runtime.health.report import HangReport, Place, write_report
from megatron_ads.runtime.peer_links import PeerLink
from megatron_ads.runtime.process_state import ProcessIdentity, describe_process

logger = logging.getLogger(__name__)

_LONGEST_MARGIN = 10.0
_WRITING_SECONDS = 10.0
"""How long writing the report may take: the file system may be what hangs."""
_SLEPT_LONGER = 2.0
"""Seconds by which waking up late shows that the process was stopped (Ctrl-Z, a suspended machine)."""


@dataclass(slots=True)
class _Inquiry:
    """A question that this rank has asked."""

    number: int
    progress: object
    """Of this rank, when it asked."""
    deadline: float
    standings: dict[int, Standing] = field(default_factory=dict)
    places: dict[int, Place] = field(default_factory=dict)


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
        on_hang: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare to report, into ``directory``, a rank that stands still, before ``timeout_seconds`` are over.

        Args:
            on_hang: Called with the report's headline before the process ends.
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
        self._neighbours: dict[int, ProcessIdentity] = {}
        self._inquiry: _Inquiry | None = None
        self._asked = 0
        self._routes: dict[tuple[int, int], PeerLink] = {}
        """By rank that asked and its question: the neighbour through whom the answers go."""
        self._others_ask_until = 0.0
        self._wake_at = self._stacks_at = 0.0
        """When this thread wants to run again, and when stacks are written because it could not."""
        self._stack_delay = max(1.0, self._answer_seconds / 2)

    def start(self, links: Sequence[PeerLink]) -> None:
        """Introduce this process to its neighbours."""
        self._links = links
        me = ProcessIdentity.own()
        for link in links:
            link.send({"kind": "hello", **asdict(me)})

    def stop(self) -> None:
        """Leave nothing behind."""
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
        stands_still = self._activity.in_step or self._activity.is_waiting()
        if stands_still and self._activity.idle_seconds() >= self._limit and now >= self._others_ask_until:
            self._ask(now)
        return None

    def hear(self, kind: str, message: dict[str, Any], link: PeerLink) -> None:
        """Take in a message of the kinds ``hello``, ``inquiry`` and ``standing``."""
        if kind == "hello":
            self._neighbours[link.rank] = ProcessIdentity(**message)
        elif kind == "inquiry":
            self._answer(message["asker"], message["number"], link)
        elif message["asker"] != self._rank:
            route = self._routes.get((message["asker"], message["number"]))
            if route is not None:
                route.send({"kind": kind, **message})
        elif self._inquiry is not None and message["number"] == self._inquiry.number:
            self._collect(self._inquiry, message)

    def _ask(self, now: float) -> None:
        self._asked += 1
        self._inquiry = _Inquiry(self._asked, self._activity.progress(), now + self._answer_seconds)
        self._collect(self._inquiry, self._own_answer())
        for link in self._links:
            link.send({"kind": "inquiry", "asker": self._rank, "number": self._asked})

    def _answer(self, asker: int, number: int, link: PeerLink) -> None:
        """Tell where this rank stands, and pass the question on; of several that ask, the lowest rank goes on."""
        if asker == self._rank or (asker, number) in self._routes:
            return
        if self._inquiry is not None and asker > self._rank:
            return
        self._inquiry = None
        self._others_ask_until = time.monotonic() + 2 * self._answer_seconds
        self._routes[asker, number] = link
        for other in self._links:
            if other is not link:
                other.send({"kind": "inquiry", "asker": asker, "number": number})
        link.send({"kind": "standing", "asker": asker, "number": number, **self._own_answer()})

    def _own_answer(self) -> dict[str, Any]:
        return {
            "rank": self._rank,
            "place": asdict(Place(socket.gethostname(), os.getpid())),
            "standing": asdict(self._activity.standing()),
            "neighbours": {
                rank: asdict(Place(known.host, known.pid, describe_process(known)))
                for rank, known in self._neighbours.items()
            },
        }

    def _collect(self, inquiry: _Inquiry, answer: dict[str, Any]) -> None:
        rank, told = answer["rank"], answer["standing"]
        wait = told["wait"] and Wait(**told["wait"])
        inquiry.standings[rank] = Standing(**told | {"wait": wait})
        inquiry.places[rank] = Place(**answer["place"])
        for neighbour, place in answer["neighbours"].items():
            seen = Place(**place)
            if int(neighbour) not in inquiry.standings and (seen.note or int(neighbour) not in inquiry.places):
                inquiry.places[int(neighbour)] = seen

    def _conclude(self, inquiry: _Inquiry, now: float) -> str | None:
        if self._activity.progress() != inquiry.progress:
            self._inquiry = None
            return None
        if len(inquiry.standings) < self._layout.world and now < inquiry.deadline:
            return None
        report = HangReport(
            asked_by=self._rank,
            seconds=self._activity.idle_seconds(),
            layout=self._layout,
            findings=find(inquiry.standings, self._layout.world),
            standings=inquiry.standings,
            places=inquiry.places,
        )
        logger.critical("%s", report.text())
        self._write(report)
        return report.headline()

    def _write(self, report: HangReport) -> None:
        def write() -> None:
            try:
                write_report(self._directory, report)
            except OSError as error:
                logger.error("the report could not be written to %s: %s", self._directory, error)

        _do_within(_WRITING_SECONDS, write)

    def ends(self, headline: str) -> None:
        """Record the end of this process."""
        if (on_hang := self._on_hang) is not None:
            _do_within(_WRITING_SECONDS, lambda: on_hang(headline))


def _do_within(seconds: float, write: Callable[[], None]) -> None:
    """Write in a thread that is left behind if it takes too long."""
    writer = threading.Thread(target=write, name="hang report", daemon=True)
    writer.start()
    writer.join(seconds)
