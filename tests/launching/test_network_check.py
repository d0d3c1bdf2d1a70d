"""Nodes find out before a job whether they can connect to each other: real sockets on loopback."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from megatron_ads.launching.network_check import check_connections, rendezvous_problems
from parity_tests.harness.ranks import free_port


def test_nodes_that_reach_each_other_say_nothing() -> None:
    port = free_port()
    with ThreadPoolExecutor(4) as pool:
        parts = [
            pool.submit(check_connections, "127.0.0.1", port, number=number, count=4, seconds=20)
            for number in (3, 1, 0, 2)
        ]
        assert [part.result(30) for part in parts] == [[]] * 4


def test_a_node_that_does_not_come_is_named_by_node_0() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        parts = [
            pool.submit(check_connections, "127.0.0.1", port, number=number, count=3, seconds=2) for number in (0, 1)
        ]
        first, second = (part.result(30) for part in parts)
    assert first == [f"node 2 did not come to the rendezvous at 127.0.0.1:{port} in time"]
    assert second == []


def test_a_node_that_cannot_be_connected_to_is_named_by_the_others() -> None:
    port, closed = free_port(), free_port()
    with ThreadPoolExecutor(2) as pool:
        host = pool.submit(check_connections, "127.0.0.1", port, number=0, count=3, seconds=10)
        honest = pool.submit(check_connections, "127.0.0.1", port, number=2, count=3, seconds=10)
        line = _connect(port)
        line.sendall(json.dumps({"number": 1, "name": "shut", "port": closed}).encode() + b"\n")
        assert b'"nodes"' in line.recv(1 << 16)
        line.sendall(b'{"kind": "tried"}\n')
        for problems in (host.result(30), honest.result(30)):
            (problem,) = problems
            assert "cannot connect to node 1 (shut, 127.0.0.1)" in problem
            assert str(closed) in problem
        line.close()


def test_a_rendezvous_where_nobody_listens_is_named() -> None:
    (problem,) = check_connections("127.0.0.1", free_port(), number=1, count=2, seconds=1)
    assert "cannot reach the rendezvous at 127.0.0.1" in problem


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as taken:
        (problem,) = check_connections("127.0.0.1", taken.getsockname()[1], number=0, count=2, seconds=1)
    assert "cannot listen on port" in problem and "MASTER_PORT" in problem


def test_a_stranger_at_the_door_does_no_harm() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        host = pool.submit(check_connections, "127.0.0.1", port, number=0, count=2, seconds=20)
        with _connect(port) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\n")
        other = pool.submit(check_connections, "127.0.0.1", port, number=1, count=2, seconds=20)
        assert (host.result(30), other.result(30)) == ([], [])


def test_a_node_0_that_cannot_be_reached_is_a_problem() -> None:
    here = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    (problem,) = rendezvous_problems(here, seconds=0)
    assert "node 0 cannot be reached at 127.0.0.1" in problem
    assert rendezvous_problems(here | {"NODE_RANK": "0"}, seconds=0) == []
    assert rendezvous_problems({}, seconds=0) == []
    (problem,) = rendezvous_problems(here | {"MASTER_PORT": "http"}, seconds=0)
    assert problem == "MASTER_PORT is 'http'; it must be a whole number."


def _connect(port: int) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise AssertionError("node 0 does not listen")
