"""When a rank dies, end the others soon, and let each name the rank it was.

A collective with a dead member may wait for its whole timeout, and ranks that are not in that collective wait longer
still. Here every rank has TCP connections to two neighbours, in a ring: the operating system closes those of a killed
process at once, and gives up those to a lost machine after ``LOST_MACHINE_SECONDS``, whatever the processes themselves
are busy with. A rank that loses a neighbour tells the other one before it exits, so the news runs around the ring from
both sides, without rank 0 and without the store. A rank that is merely slow is left alone; hangs are ``watch``'s part.

    with PeerMonitor(layout) as monitor:
        for step in steps:
            ...
            monitor.report_step(step)
"""

import contextlib
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime.health.activity import CommunicationError
from megatron_ads.runtime.health.rank_record import ExitStatus
from megatron_ads.runtime.process_groups import job_store

if TYPE_CHECKING:
    from megatron_ads.runtime.health.watch import HangWatch

logger = logging.getLogger(__name__)

LOST_MACHINE_SECONDS = 30
_PROBE_SECONDS = 5
_OWN_ERROR_SECONDS = 2.0
"""How long a rank may run on after hearing of a peer's error: it may be about to find the same one itself."""
_NEWS_SECONDS = 3.0
"""How long a rank whose communication failed waits to hear which peer has gone."""


@dataclass(slots=True)
class PeerLink:
    """One end of the connection to a neighbour; messages are one JSON object a line."""

    rank: int
    """Of the neighbour."""
    socket: socket.socket
    _buffer: bytearray = field(default_factory=bytearray)
    _sending: threading.Lock = field(default_factory=threading.Lock)
    """Messages of two threads must not be mixed."""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; a neighbour that is gone already is no error: ``receive`` will notice."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending, contextlib.suppress(OSError):
            self.socket.sendall(line)

    def receive(self) -> Iterator[dict[str, Any]]:
        """Yield the whole messages that have arrived.

        Raises:
            ConnectionError: If the neighbour's process or machine is gone.
        """
        try:
            data = self.socket.recv(1 << 16)
        except OSError as error:
            raise ConnectionError(str(error)) from error
        if not data:
            raise ConnectionError("closed")
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest
        yield from map(json.loads, lines)


def join_ring(rank: int, world: int, timeout_seconds: float = 60.0) -> list[PeerLink]:
    """Connect this rank with the next and the previous one of ``world``, in that order; every rank must call it.

    Raises:
        CommunicationError: Naming the neighbour that did not come or cannot be reached.
    """
    store, timeout = job_store("peer links"), timedelta(seconds=timeout_seconds)
    following, previous = (rank + 1) % world, (rank - 1) % world
    deadline = time.monotonic() + timeout_seconds
    token = _shared_token(store, rank, timeout)
    host = _own_address()
    with socket.create_server(("127.0.0.1" if host == "127.0.0.1" else "", 0)) as server:
        store.set(f"address/{rank}", f"{host} {server.getsockname()[1]}")
        try:
            store.wait([f"address/{following}"], timeout)
            address, port = store.get(f"address/{following}").decode().split()
            outgoing = socket.create_connection((address, int(port)), timeout=timeout_seconds)
            outgoing.sendall(token)
            incoming = _accept(server, token, deadline)
        except (dist.DistStoreError, OSError) as error:
            raise CommunicationError(
                f"Rank {rank} could not link up with its neighbours, ranks {previous} and {following}, within "
                f"{timeout_seconds:g} s: {error}. Look at their logs; a firewall must let the ranks reach each other."
            ) from error
    return [PeerLink(following, _probed(outgoing)), PeerLink(previous, _probed(incoming))]


def _shared_token(store: Store, rank: int, timeout: timedelta) -> bytes:
    """Return what a connection of this job begins with, so that no other program is taken for a rank."""
    if rank == 0:
        store.set("token", secrets.token_hex(16))
    store.wait(["token"], timeout)
    token: bytes = store.get("token")
    return token


def _accept(server: socket.socket, token: bytes, deadline: float) -> socket.socket:
    while True:
        server.settimeout(max(0.1, deadline - time.monotonic()))
        connection, _ = server.accept()
        connection.settimeout(_PROBE_SECONDS)
        received = b""
        with contextlib.suppress(OSError):  # a stranger may hang up or stay silent
            while len(received) < len(token) and (part := connection.recv(len(token) - len(received))):
                received += part
        if received == token:
            return connection
        connection.close()


def _probed(connection: socket.socket) -> socket.socket:
    """Let the system probe an idle connection, so that a machine that lost power is noticed."""
    connection.settimeout(LOST_MACHINE_SECONDS)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, _PROBE_SECONDS),
        (socket.TCP_KEEPINTVL, _PROBE_SECONDS),
        (socket.TCP_KEEPCNT, LOST_MACHINE_SECONDS // _PROBE_SECONDS - 1),
        (socket.TCP_USER_TIMEOUT, LOST_MACHINE_SECONDS * 1000),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def _own_address() -> str:
    """Return the address at which other machines of the job reach this one; loopback if it is the only one."""
    if os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE"):
        return "127.0.0.1"
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, int(os.environ.get("MASTER_PORT", "1"))))  # chooses a route; sends nothing
        address: str = probe.getsockname()[0]
    return master if address.startswith("127.") else address


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
        on_loss: Callable[[LostPeer], None] | None = None,
        hangs: "HangWatch | None" = None,
    ) -> None:
        """Prepare; ``on_loss`` is called once, in the thread, before the process ends with ``PEER_LOST``."""
        self._layout = layout
        self._on_loss = on_loss
        self._hangs = hangs
        self._is_watching = layout.world > 1 or hangs is not None
        self._rank = dist.get_rank()
        self._links: list[PeerLink] = []
        self._steps: dict[int, int] = {}
        self._own_step: int | None = None
        self._is_leaving = False
        self._stopped_by_error = threading.Event()

    def __enter__(self) -> Self:
        """Link up with the neighbours; every rank of the job must come here."""
        if self._layout.world > 1:
            self._links = join_ring(self._rank, self._layout.world)
        if self._is_watching:
            if self._hangs:
                self._hangs.start(self._links)
            self._wake, self._woken = socket.socketpair()
            self._thread = threading.Thread(target=self._watch, name="peer monitor", daemon=True)
            self._thread.start()
            os.register_at_fork(after_in_child=self._close)  # a child would keep the connections of a dead rank open
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Leave in peace, or tell the others what was raised here."""
        if not self._is_watching:
            return
        if isinstance(error, CommunicationError):
            self._stopped_by_error.set()
            self._thread.join(_NEWS_SECONDS)  # which names the lost peer and ends the process, if it hears of one
        self._is_leaving = True
        self._stopped_by_error.set()
        farewell: dict[str, Any] = {"kind": "done"}
        if error is not None and not isinstance(error, SystemExit):
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            farewell = {"kind": "loss", **asdict(LostPeer(self._rank, self._stage(self._rank), self._own_step, text))}
        self._tell(farewell)
        self._wake.send(b"x")
        self._thread.join()
        if self._hangs:
            self._hangs.stop()
        self._close()

    def report_step(self, step: int) -> None:
        """Let the neighbours know that ``step`` is finished here; costs two small writes."""
        self._own_step = step
        self._tell({"kind": "step", "step": step})

    def _stage(self, rank: int) -> int:
        return self._layout.coordinates(rank).pp

    def _tell(self, message: dict[str, Any], *, except_for: PeerLink | None = None) -> None:
        for link in self._links:
            if link is not except_for:
                link.send(message)

    def _close(self) -> None:
        for each in (*(link.socket for link in self._links), self._wake, self._woken):
            each.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for link in self._links:
                selector.register(link.socket, selectors.EVENT_READ, link)
            while not self._is_leaving:
                for key, _ in selector.select(self._hangs.seconds_to_sleep() if self._hangs else None):
                    if key.data is not None and not self._hear(key.data):
                        selector.unregister(key.fileobj)
                if self._hangs and not self._is_leaving and (headline := self._hangs.look()):
                    self._end_hung(headline, heard_from=None)

    def _hear(self, link: PeerLink) -> bool:
        """Handle what a neighbour says; return whether it may say more."""
        try:
            for message in link.receive():
                kind = message.pop("kind")
                if kind == "step":
                    self._steps[link.rank] = message["step"]
                elif kind == "done":
                    return False
                elif kind == "loss":
                    self._end_over(LostPeer(**message), heard_from=link)
                elif kind == "hang":
                    self._end_hung(message["headline"], heard_from=link)
                elif self._hangs:
                    self._hangs.hear(kind, message, link)
        except ConnectionError:
            loss = LostPeer(link.rank, self._stage(link.rank), self._steps.get(link.rank), None)
            self._end_over(loss, heard_from=link)
        return True

    def _end_over(self, loss: LostPeer, *, heard_from: PeerLink) -> None:
        """Pass the news on and end this process, unless it is leaving anyway."""
        if loss.rank == self._rank or self._is_leaving:
            return
        self._tell({"kind": "loss", **asdict(loss)}, except_for=heard_from)
        if loss.error is not None and self._stopped_by_error.wait(_OWN_ERROR_SECONDS) and self._is_leaving:
            return
        logger.critical("%s; this rank cannot continue without it and exits with %d.", loss, ExitStatus.PEER_LOST)
        if self._on_loss:
            self._on_loss(loss)
        _exit(ExitStatus.PEER_LOST)

    def _end_hung(self, headline: str, *, heard_from: PeerLink | None) -> None:
        """Pass on that the job hangs and end this process."""
        self._tell({"kind": "hang", "headline": headline}, except_for=heard_from)
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
