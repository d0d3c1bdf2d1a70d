"""Whether the nodes of a job can open connections to each other, tried before any rank is started.

Every node runs :func:`check_connections`. Node 0 listens at the rendezvous of the ranks and sends all nodes the
addresses of the others; then each connects to every other one. Ports are the system's choice, as those of the
communication libraries are, so a firewall that would stop these stops the trial. No torch.
"""

import json
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ads.errors import ConfigError
from megatron_ads.launching.environment import environment_number

_PATIENCE_SECONDS = 10.0
"""For one connection, when both ends are known to be there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeAddress:
    """Where one node listens during the trial."""

    number: int
    name: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"node {self.number} ({self.name}, {self.address})"


def check_connections(host: str, port: int, *, number: int, count: int, seconds: float = 60.0) -> list[str]:
    """Try every connection from this node; return a line for each that fails, and on node 0 for each absent node."""
    deadline = time.monotonic() + seconds
    with socket.create_server(("", 0), backlog=1024) as own:
        here = socket.gethostname()
        if number == 0:
            first = NodeAddress(number=0, name=here, address=host, port=own.getsockname()[1])
            try:
                with socket.create_server(("", port), backlog=1024) as door:
                    return _host(door, first, count, deadline)
            except OSError as error:
                return [f"node 0 ({here}) cannot listen on port {port}: {error}. Choose another MASTER_PORT."]
        try:
            return _join(host, port, own.getsockname()[1], number, deadline)
        except (OSError, ValueError) as error:
            return [
                f"node {number} ({here}) cannot reach the rendezvous at {host}:{port}: {error}. This must be node 0, "
                "with no firewall in between; MASTER_ADDR names another address of it."
            ]


def _host(door: socket.socket, first: NodeAddress, count: int, deadline: float) -> list[str]:
    """Node 0: wait for the others, send everyone the addresses, and wait until all have tried."""
    nodes, lines = [first], {}
    door.settimeout(1.0)
    while len(nodes) < count and time.monotonic() < deadline:
        try:
            connection, (address, _) = door.accept()
        except TimeoutError:
            continue
        connection.settimeout(_PATIENCE_SECONDS)
        try:
            said = _receive(connection)
            lines[int(said["number"])] = connection
            nodes.append(NodeAddress(number=said["number"], name=said["name"], address=address, port=said["port"]))
        except (OSError, ValueError, KeyError):  # a stranger
            connection.close()
    place = f"{first.address}:{door.getsockname()[1]}"
    absent = sorted(set(range(count)) - {node.number for node in nodes})
    problems = [f"node {number} did not come to the rendezvous at {place} in time" for number in absent]
    for connection in lines.values():
        _send(connection, {"nodes": [asdict(node) for node in nodes]})
    problems += _try_all(first, nodes)
    for connection in lines.values():  # all must listen until all have tried
        connection.settimeout(max(1.0, deadline - time.monotonic() + _PATIENCE_SECONDS))
        with suppress(OSError, ValueError):
            _receive(connection)
    for connection in lines.values():
        _send(connection, {"kind": "end"})
        connection.close()
    return problems


def _join(host: str, port: int, own_port: int, number: int, deadline: float) -> list[str]:
    """Any other node: report to node 0, try the nodes it names, and stay until all have tried."""
    with _connected(host, port, deadline) as line:
        _send(line, {"number": number, "name": socket.gethostname(), "port": own_port})
        line.settimeout(max(1.0, deadline - time.monotonic() + _PATIENCE_SECONDS))
        nodes = [NodeAddress(**node) for node in _receive(line)["nodes"]]
        problems = _try_all(next(node for node in nodes if node.number == number), nodes)
        _send(line, {"kind": "tried"})
        line.settimeout(max(1.0, deadline - time.monotonic() + 2 * _PATIENCE_SECONDS))
        _receive(line)
        return problems


def _connected(host: str, port: int, deadline: float) -> socket.socket:
    """Return a connection to node 0, which may begin to listen later; the last OSError when the time is up."""
    while True:
        try:
            seconds = min(_PATIENCE_SECONDS, max(1.0, deadline - time.monotonic()))
            return socket.create_connection((host, port), timeout=seconds)
        except OSError:
            if time.monotonic() + 0.5 > deadline:
                raise
            time.sleep(0.5)


def _try_all(own: NodeAddress, nodes: list[NodeAddress]) -> list[str]:
    problems = []
    for node in nodes:
        if node.number == own.number:
            continue
        try:
            socket.create_connection((node.address, node.port), timeout=_PATIENCE_SECONDS).close()
        except OSError as error:
            problems.append(
                f"{own} cannot connect to {node} on port {node.port}: {error}. Open the ports between them."
            )
    return problems


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):  # the other end is gone, as its own log says
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Return one message of one line; OSError if the other end is gone or silent, ValueError if it is no message."""
    with connection.makefile("rb") as lines:
        data = lines.readline(1 << 22)
    if not data:
        raise ConnectionError("the connection was closed")
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


def rendezvous_problems(environment: Mapping[str, str], seconds: float = 300.0) -> list[str]:
    """Return why node 0 cannot listen, or be reached from here; it may be started up to ``seconds`` later."""
    try:
        nodes, node = environment_number(environment, "NNODES", 1), environment_number(environment, "NODE_RANK", 0)
        port = environment_number(environment, "MASTER_PORT", 29500)
    except ConfigError as error:
        return [str(error)]
    host = environment.get("MASTER_ADDR")
    if not host or nodes == 1:
        return []
    try:
        if node == 0:
            failure = f"node 0 cannot listen on port {port} (MASTER_PORT)"
            advice = "Set MASTER_PORT on every node to a port that is free on this one."
            socket.create_server(("", port)).close()
        else:
            failure = f"node 0 cannot be reached at {host}:{port} (MASTER_ADDR:MASTER_PORT) within {seconds:.0f} s"
            advice = "Start the job there too, and open the port between the nodes."
            _connected(host, port, time.monotonic() + seconds).close()
    except (OSError, OverflowError) as error:
        return [f"{failure}: {error}. {advice}"]
    return []
