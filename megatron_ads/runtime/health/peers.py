"""When a rank dies, end the others soon, and let each name the rank it was.

A collective with a dead member may wait for its whole timeout, and ranks that are not in that collective wait longer
still. Here every rank watches its two neighbours in the ``ring``. A rank that loses one tells the other before it
exits, so the news runs around the ring from both sides, without rank 0 and without the store. A rank that is merely
slow is left alone; hangs are ``watch``'s part.
"""

import logging
import multiprocessing.connection
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Self

import torch.distributed as dist

from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime.health.activity import CommunicationError
from megatron_ads.runtime.health.rank_record import ExitStatus
from megatron_ads.runtime.health.ring import PeerLink, join_ring, tell
from megatron_ads.runtime.health.watch import HangWatch

logger = logging.getLogger(__name__)

_OWN_ERROR_SECONDS = 2.0
"""How long a rank may run on after hearing of a peer's error: it may be about to find the same one itself."""
_NEWS_SECONDS = 3.0
"""How long a rank whose communication failed waits to hear which peer has gone."""


@dataclass(frozen=True, slots=True)
class LostPeer:
    """That a rank has left the job before its end."""

    rank: int
    stage: int
    step: int | None
    """The last one that it reported as finished, as far as its neighbour heard."""
    error: str | None
    """What it raised; None if its process was killed or its machine lost."""

    def __str__(self) -> str:
        last = "before its first step ended" if self.step is None else f"after step {self.step}"
        how = "has gone (killed, or its machine lost)" if self.error is None else f"failed with {self.error}"
        return f"rank {self.rank} (stage {self.stage}) {how}, {last}"


class PeerMonitor:
    """Watches the neighbours in a thread that sleeps until something happens."""

    def __init__(
        self,
        layout: ParallelLayout,
        *,
        on_loss: Callable[[LostPeer], None] = lambda loss: None,
        hangs: HangWatch | None = None,
    ) -> None:
        """Prepare; ``on_loss`` is called once, in the thread, before the process ends with ``PEER_LOST``."""
        self._layout = layout
        self._on_loss = on_loss
        self._hangs = hangs
        self._rank = dist.get_rank()
        self._links: list[PeerLink] = []
        self._steps: dict[int, int] = {}
        """Last finished, by rank."""
        self._is_leaving = False
        self._stopped_by_error = threading.Event()

    def __enter__(self) -> Self:
        """Link up with the neighbours; every rank of the job must come here."""
        if self._layout.world > 1:
            self._links = join_ring(self._rank, self._layout.world)
        if self._hangs:
            self._hangs.start(self._links)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="peer monitor", daemon=True)
        self._thread.start()
        os.register_at_fork(after_in_child=self._close)  # a child would keep the connections of a dead rank open
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Leave in peace, or tell the others what was raised here."""
        if isinstance(error, CommunicationError):
            self._stopped_by_error.set()
            self._thread.join(_NEWS_SECONDS)  # which names the lost peer and ends the process, if it hears of one
        self._is_leaving = True
        self._stopped_by_error.set()
        if error is None or isinstance(error, SystemExit):
            tell(self._links, "done")
        else:
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            tell(self._links, "loss", self._loss(self._rank, text))
        self._wake.send(b"x")
        self._thread.join()
        if self._hangs:
            self._hangs.stop()
        self._close()

    def report_step(self, step: int) -> None:
        """Let the neighbours know that ``step`` is finished here; costs two small writes."""
        self._steps[self._rank] = step
        tell(self._links, "step", step)

    def _loss(self, rank: int, error: str | None) -> LostPeer:
        return LostPeer(rank, self._layout.coordinates(rank).pp, self._steps.get(rank), error)

    def _close(self) -> None:
        for link in self._links:
            link.close()
        self._wake.close()
        self._woken.close()

    def _watch(self) -> None:
        heard: list[Any] = [self._woken, *self._links]
        while not self._is_leaving:
            seconds = self._hangs.seconds_to_sleep() if self._hangs else None
            for ready in multiprocessing.connection.wait(heard, seconds):
                if isinstance(ready, PeerLink) and not self._hear(ready):
                    heard.remove(ready)
            if self._hangs and not self._is_leaving and (headline := self._hangs.look()):
                self._end_hung(headline, heard_from=None)

    def _hear(self, link: PeerLink) -> bool:
        try:
            kind, content = link.receive()
        except (EOFError, OSError, pickle.UnpicklingError):
            kind, content = "loss", self._loss(link.rank, None)
        if kind == "step":
            self._steps[link.rank] = content
        elif kind == "loss":
            self._end_over(content, heard_from=link)
        elif kind == "hang":
            self._end_hung(content, heard_from=link)
        elif self._hangs and kind != "done":
            self._hangs.hear(kind, content, link)
        return kind != "done"

    def _end_over(self, loss: LostPeer, *, heard_from: PeerLink) -> None:
        """Pass the news on and end this process, unless it is leaving anyway."""
        if loss.rank == self._rank or self._is_leaving:
            return
        tell(self._links, "loss", loss, except_for=heard_from)
        if loss.error is not None and self._stopped_by_error.wait(_OWN_ERROR_SECONDS) and self._is_leaving:
            return
        logger.critical("%s; this rank cannot continue without it and exits with %d.", loss, ExitStatus.PEER_LOST)
        self._on_loss(loss)
        _exit(ExitStatus.PEER_LOST)

    def _end_hung(self, headline: str, *, heard_from: PeerLink | None) -> None:
        tell(self._links, "hang", headline, except_for=heard_from)
        if heard_from is not None:
            logger.critical("%s; this rank exits with %d.", headline, ExitStatus.HUNG)
        if self._hangs:
            self._hangs.ends(headline)
        _exit(ExitStatus.HUNG)


def _exit(status: ExitStatus) -> NoReturn:
    """End the process at once, whatever its other threads do."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(0.1)  # the news must have left before the connections close
    os._exit(status)
