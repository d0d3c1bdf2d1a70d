"""A ring of TCP connections among the ranks of a job: each rank is connected with the next and the previous one.

The operating system closes the connections of a killed process at once, and gives up those to a lost machine after
``LOST_MACHINE_SECONDS``, whatever the processes themselves are busy with.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from megatron_ads.runtime.health.activity import CommunicationError
from megatron_ads.runtime.process_groups import job_store

LOST_MACHINE_SECONDS = 30
_PROBE_SECONDS = 5


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
