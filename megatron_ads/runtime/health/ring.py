"""A ring of TCP connections among the ranks of a job: each rank is connected with the next and the previous one.

The operating system closes the connections of a killed process at once, and gives up those to a lost machine after
``LOST_MACHINE_SECONDS``, whatever the processes themselves are busy with.
"""

import contextlib
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from megatron_ads.runtime.health.activity import CommunicationError
from megatron_ads.runtime.process_groups import job_store
from megatron_ads.runtime.records import from_bytes, to_bytes

LOST_MACHINE_SECONDS = 30
_PROBE_SECONDS = 5


class PeerLink:
    """One end of the connection to a neighbour; what is sent is a kind of message and its content."""

    def __init__(self, rank: int, connected: socket.socket) -> None:
        """Take over the socket that leads to ``rank``, and let the system notice when its machine loses power."""
        self.rank = rank
        connected.setblocking(True)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", LOST_MACHINE_SECONDS, 0))
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_NODELAY, 1),
            (socket.TCP_KEEPIDLE, _PROBE_SECONDS),
            (socket.TCP_KEEPINTVL, _PROBE_SECONDS),
            (socket.TCP_KEEPCNT, LOST_MACHINE_SECONDS // _PROBE_SECONDS - 1),
            (socket.TCP_USER_TIMEOUT, LOST_MACHINE_SECONDS * 1000),
        ):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self._connection: Connection[Any, Any] = Connection(connected.detach())
        self._sending = threading.Lock()  # messages of two threads must not be mixed
        self.fileno, self.close = self._connection.fileno, self._connection.close

    def send(self, kind: str, content: object = None) -> None:
        """Send a message; a neighbour that is gone already is no error: ``receive`` will notice."""
        with self._sending, contextlib.suppress(OSError):
            self._connection.send_bytes(to_bytes((kind, content)))

    def receive(self) -> tuple[str, Any]:
        """Wait for a message, and return its kind and content.

        Raises:
            EOFError, OSError: If the neighbour's process or machine is gone.
            pickle.UnpicklingError: If what comes is no message.
        """
        kind, content = from_bytes(self._connection.recv_bytes())
        return kind, content


def tell(links: Iterable[PeerLink], kind: str, content: object = None, *, except_for: PeerLink | None = None) -> None:
    """Send a message to the neighbours; what one of them said goes to the other one only (``except_for``)."""
    for link in links:
        if link is not except_for:
            link.send(kind, content)


def join_ring(rank: int, world: int, timeout_seconds: float = 60.0) -> list[PeerLink]:
    """Connect this rank with the next and the previous one of ``world``, in that order; every rank must call it.

    Raises:
        CommunicationError: Naming the neighbour that did not come or cannot be reached.
    """
    store, deadline = job_store("peer links"), time.monotonic() + timeout_seconds
    following, previous = (rank + 1) % world, (rank - 1) % world
    if rank == 0:
        store.set("token", secrets.token_hex(16))
    host = _own_address()
    with socket.create_server(("127.0.0.1" if host == "127.0.0.1" else "", 0)) as server:
        store.set(f"address/{rank}", f"{host} {server.getsockname()[1]}")
        try:
            store.wait(["token", f"address/{following}"], timedelta(seconds=timeout_seconds))
            token: bytes = store.get("token")
            address, port = store.get(f"address/{following}").decode().split()
            outgoing = socket.create_connection((address, int(port)), timeout=timeout_seconds)
            outgoing.sendall(token)
            incoming = _accept(server, token, deadline)
        except (dist.DistStoreError, OSError) as error:
            raise CommunicationError(
                f"Rank {rank} could not link up with its neighbours, ranks {previous} and {following}, within "
                f"{timeout_seconds:g} s: {error}. Look at their logs; a firewall must let the ranks reach each other."
            ) from error
    return [PeerLink(following, outgoing), PeerLink(previous, incoming)]


def _accept(server: socket.socket, token: bytes, deadline: float) -> socket.socket:
    """Return a connection that begins with the job's token, so that no other program is taken for a rank."""
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


def _own_address() -> str:
    """Return the address at which other machines of the job reach this one; loopback if it is the only one."""
    if os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE"):
        return "127.0.0.1"
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, int(os.environ.get("MASTER_PORT", "1"))))  # chooses a route; sends nothing
        address: str = probe.getsockname()[0]
    return master if address.startswith("127.") else address
