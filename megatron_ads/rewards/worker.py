"""The process in which a reward of one's own runs, so that it can neither hang nor end the job.

A process and not a thread: a thread that loops or sleeps cannot be ended, and would keep its share of the interpreter
for the rest of the job. A fresh interpreter and not a fork: the trainer has threads, collectives and perhaps a GPU. It
imports the function, NumPy and what rollouts are made of, and no torch. It is started when it is first needed, killed
with all its children when its time is up, and started again for what is left; it ends by itself when the trainer is
gone. The trainer sends it rollouts (pickled, by us) and reads JSON: nothing that user code made is unpickled.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from megatron_ads.errors import ConfigError, one_line
from megatron_ads.rewards.own_function import load
from megatron_ads.rewards.reward import Fault, Outcome, RewardFailure, Unit
from megatron_ads.rollouts import Rollout

START_SECONDS = 300.0
"""Longest import of a function: once a job, and once more after each time that it was killed."""


class Worker:
    """A process of the trainer's that computes one reward."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """Take what ``own_function.load`` takes; nothing is started yet."""
        self._name, self._settings = name, dict(settings)
        self._unit = Unit.batch
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._overdue = False

    def start(self) -> Unit:
        """Start the process if there is none, and return what its function is given at once.

        Raises:
            ConfigError: If the function cannot be used, or its import does not end in ``START_SECONDS``.
        """
        if self.is_running:
            return self._unit
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what it prints is no result of the job
                env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},  # it ends without a flush
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the trainer, which ends it, with its children
            )
        self._connection = Connection(ours.detach())
        reply = self._exchange((self._name, self._settings), START_SECONDS)
        if isinstance(reply, RewardFailure):
            raise ConfigError(f"The reward {self._name} {reply.text} while it was imported. Correct its code.")
        if "error" in reply:
            self.close()
            raise ConfigError(reply["error"])
        self._unit = Unit(reply["unit"])
        return self._unit

    @property
    def is_running(self) -> bool:
        """Whether there is a process that can be asked."""
        return self._process is not None

    def ask(self, rollouts: Sequence[Rollout], seconds: float) -> list[Outcome]:
        """Return what the function makes of one unit of rollouts; if that takes longer, the process is killed."""
        reply = self._exchange(rollouts, seconds)
        if isinstance(reply, RewardFailure):
            return [reply] * len(rollouts)
        return [RewardFailure(Fault(value[0]), value[1]) if isinstance(value, list) else value for value in reply]

    def close(self) -> None:
        """Kill the process and what it started."""
        if self._process is None or self._connection is None:
            return
        self._kill()
        self._process.wait()
        self._connection.close()
        self._process = self._connection = None

    def _exchange(self, request: object, seconds: float) -> Any:
        """Return the reply to a request, or why there is none; then the process is gone."""
        assert self._connection is not None, "started"
        self._overdue, reply = False, None
        timer = threading.Timer(seconds, self._kill_overdue)
        timer.daemon = True
        timer.start()
        with suppress(EOFError, OSError, ValueError):  # ValueError: its children write to the connection too
            self._connection.send(request)
            reply = json.loads(self._connection.recv_bytes())
        timer.cancel()
        timer.join()
        if reply is not None and not self._overdue:
            return reply
        self.close()
        if self._overdue:
            return RewardFailure(Fault.timed_out, f"took longer than {seconds:.3g} s")
        return RewardFailure(Fault.died, "ended its process")

    def _kill_overdue(self) -> None:
        self._overdue = True
        self._kill()

    def _kill(self) -> None:
        process, connection = self._process, self._connection
        if process is None or connection is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as ours:
            ours.shutdown(socket.SHUT_RDWR)  # wakes us also if something else holds the other end


def main(connection: Connection, parent: int) -> None:
    """Serve one function to the process that started this one, until that closes the connection or ends."""
    os.set_inheritable(connection.fileno(), False)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()

    def say(reply: object) -> None:
        connection.send_bytes(json.dumps(reply).encode())

    try:
        function = load(*connection.recv())
    except ConfigError as error:
        say({"error": one_line(error)})
        return
    say({"unit": function.unit})
    with suppress(EOFError, OSError):
        while True:
            rollouts = connection.recv()
            try:
                found = function.outcomes(rollouts)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # it may raise whatever it likes
                found = [RewardFailure(Fault.raised, f"{type(error).__name__}: {one_line(error)}")] * len(rollouts)
            say([[value.fault, value.text] if isinstance(value, RewardFailure) else value for value in found])


def _end_with(parent: int) -> None:
    """End this process, whatever its function does, when the one that started it has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
