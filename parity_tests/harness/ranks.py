"""Run a function on every rank of a small job: real processes, real gloo collectives, loopback only.

    def _sum_of_ranks() -> float: ...            # at module level, so that a rank can import it
    assert run_ranks(4, _sum_of_ranks) == [6.0, 6.0, 6.0, 6.0]

Ranks are forked from one process that has imported torch and Megatron-Core, so that starting them takes a moment. Each
call has its own: a trained model cannot be freed (Megatron's DistributedDataParallel refers to itself through
autograd), nor can its process groups, each with a thread of gloo that wakes 100 times a second.
"""

import contextlib
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

from parity_tests.harness.rank_server import STACK_SIGNAL

_GRACE_SECONDS = 10.0
"""How long the other ranks may continue after one has failed, before the pool is ended."""
_ROOT = Path(__file__).resolve().parents[2]
_LOG_TAIL_CHARACTERS = 2000


class RanksFailed(AssertionError):
    """Ranks of a distributed test raised, died or did not finish; ``failures`` says what each of them did."""

    def __init__(self, world: int, failures: dict[int, str]) -> None:
        parts = [f"--- rank {rank} of {world} {failures[rank]}" for rank in sorted(failures)]
        super().__init__("\n".join(parts))
        self.failures = failures


@dataclass(slots=True)
class _Rank:
    pid: int
    connection: Connection
    status: int | None = None
    """Exit status once it has ended; the negative number of the signal that killed it."""

    def wait(self) -> int:
        """Return the exit status of a rank that has ended, or is about to."""
        if self.status is None:
            self.status = _ask_server("wait", self.pid)
        return self.status


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 120, process_group: bool = True
) -> list[Any]:
    """Call ``function(*args)`` on ``world`` ranks at the same time and return what each returned, by rank.

    ``function`` belongs to the top level of a test module. It finds the default process group (gloo) initialised,
    or, with ``process_group=False``, only the environment that torchrun would have set.

    Args:
        timeout: Seconds until ranks that have not finished are killed, and their Python stacks reported.

    Raises:
        RanksFailed: With the traceback, exit status or stack of every rank that failed.
    """
    ranks = _Ranks(world)
    try:
        return ranks.call(function, args, timeout, process_group)
    finally:
        ranks.kill()


def stop_all() -> None:
    """End the process that ranks are forked from."""
    if _server.cache_info().currsize:
        with _server():  # leaving closes its standard input, on which it ends
            pass
        _server.cache_clear()


@cache
def _server() -> subprocess.Popen[str]:
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",  # the same test on every machine, and a CUDA context does not survive a fork
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(_ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "parity_tests.harness.rank_server"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT, env=environment,
    )  # fmt: skip


def _ask_server(*words: object) -> int:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    print(*words, file=server.stdin, flush=True)
    answer = server.stdout.readline()
    if not answer:
        raise RuntimeError(f"The rank server ended with status {server.wait()}; its error output is above.")
    return int(answer)


class _Ranks:
    """The processes of one call."""

    def __init__(self, world: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=f"ranks-{world}-"))
        address = str(self._folder / "socket")
        with Listener(address, "AF_UNIX", backlog=world) as listener:
            pids = [_ask_server("fork", rank, world, address, self._folder) for rank in range(world)]
            connections: dict[int, Connection] = {}
            for _ in range(world):
                connection = listener.accept()
                connections[int(connection.recv_bytes())] = connection
        self._ranks = [_Rank(pid, connections[rank]) for rank, pid in enumerate(pids)]

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float, process_group: bool
    ) -> list[Any]:
        """Run one call on every rank; see ``run_ranks``."""
        message = pickle.dumps((function, args, free_port(), process_group))
        for rank in self._ranks:
            rank.connection.send_bytes(message)
        results, failures = self._collect(time.monotonic() + timeout)
        pending = [rank for rank in range(len(self._ranks)) if rank not in results and rank not in failures]
        if pending or failures:
            stacks = self._stacks(pending)
            failures |= {rank: f"did not finish; its stack was\n{stacks[rank]}{self._log(rank)}" for rank in pending}
            raise RanksFailed(len(self._ranks), failures)
        return [results[rank] for rank in range(len(self._ranks))]

    def kill(self) -> None:
        """End the ranks and what they have started at once, and forget their files."""
        for rank in self._ranks:
            if rank.status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
        for rank in self._ranks:
            with contextlib.suppress(RuntimeError):
                rank.wait()
            rank.connection.close()
        shutil.rmtree(self._folder)

    def _collect(self, deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Return results and failures by rank; a rank in neither was still busy at the deadline."""
        waiting = {rank.connection: number for number, rank in enumerate(self._ranks)}
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                assert isinstance(connection, Connection)
                number = waiting.pop(connection)
                try:
                    succeeded, answer = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    succeeded, answer = False, None
                if succeeded:
                    results[number] = answer
                else:
                    failures[number] = self._failure(number, answer)
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return results, failures

    def _failure(self, number: int, traceback_text: str | None) -> str:
        if traceback_text is not None:
            return f"raised\n{traceback_text}{self._log(number)}"
        return f"died with exit status {self._ranks[number].wait()}\n{self._log(number)}"

    def _stacks(self, numbers: list[int]) -> dict[int, str]:
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._ranks[number].pid, STACK_SIGNAL)
        if numbers:
            time.sleep(0.5)
        return {number: (self._folder / f"stack-{number}").read_text() for number in numbers}

    def _log(self, number: int) -> str:
        text = (self._folder / f"output-{number}").read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]
        return f"its output ended with\n{text}" if text else ""


def free_port() -> int:
    """Return a port below the range (from 32768) from which the system hands out ports to others meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
