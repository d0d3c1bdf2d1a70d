"""Run one piece of a benchmark in a process of its own, with a time limit; nothing that it started is left."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_GRACE_SECONDS = 5.0
"""How long it may take to end after SIGTERM: torchrun then ends its ranks."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    seconds: float
    exit_status: int | None
    """None: it had to be ended."""
    last_line: str
    """Of what it printed."""

    @property
    def error(self) -> str | None:
        """Return what is to be said if it did not end well."""
        if self.exit_status is None:
            return f"was not done after {self.seconds:.0f} s"
        return f"exit status {self.exit_status}: {self.last_line}" if self.exit_status else None


def run_bounded(
    command: Sequence[str], log: Path, *, name: str, seconds: float, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run ``command`` in the repository's folder; what it prints is appended to ``log``, under its ``name``."""
    began = time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n===== {name}\n".encode())
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        exit_status = _wait(process, seconds)
    return Ended(time.monotonic() - began, exit_status, _last_line(log, begin))


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Return the exit status, or None if the process had to be ended; none of its session is left either way."""
    status: int | None = None
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return status


def _last_line(log: Path, begin: int) -> str:
    with log.open("rb") as handle:
        handle.seek(begin)
        lines = handle.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"
