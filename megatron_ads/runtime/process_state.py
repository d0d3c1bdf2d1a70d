"""What the system says about another process of this machine that does not answer."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_STATES = {
    "T": "its process is stopped",
    "t": "its process is stopped by a debugger",
    "D": "its process is stuck in the kernel, as in a read or write of a disk or a network file system",
    "R": "its process is busy in C code that keeps the interpreter lock",
    "S": "its process sleeps in C code that keeps the interpreter lock",
    "Z": "its process has died",
}
_STATE, _START = 0, 19
"""Positions among the fields of /proc/PID/stat behind the name."""


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process: the start time tells it from a later one with its number, or of another container."""

    host: str
    pid: int
    started: str

    @classmethod
    def own(cls) -> Self:
        """Return that of this process."""
        fields = _fields(os.getpid())
        return cls(socket.gethostname(), os.getpid(), fields[_START] if fields else "")


def describe_process(process: ProcessIdentity) -> str:
    """Return what a process does that does not answer; empty if it is not to be seen from here."""
    fields = _fields(process.pid) if process.host == socket.gethostname() else []
    if not fields or fields[_START] != process.started:
        return ""
    return _STATES.get(fields[_STATE], "")


def _fields(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
