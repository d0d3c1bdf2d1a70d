"""A job in processes of its own: its output goes to a log file, its metrics to a progress bar."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Self, TextIO

from megatron_ads.errors import MegatronAdsError
from megatron_ads.observability.metrics import METRICS_FILE, read_metrics
from megatron_ads.progress import Progress
from megatron_ads.training.stopping import STOP_SIGNALS

POLL_SECONDS = 0.5
GRACE_SECONDS = 60.0
"""How long an interrupted job may take to save and end before it is killed."""
_PR_SET_PDEATHSIG = 1


class JobError(MegatronAdsError, RuntimeError):
    """A job that was started ended with an error; the message quotes its log and says where that is."""


def run_job(
    command: Sequence[str],
    log: Path,
    *,
    accepted: Sequence[int] = (0,),
    environment: Mapping[str, str] | None = None,
    while_running: Callable[[], None] = lambda: None,
) -> int:
    """Run ``command`` to its end, its output appended to ``log``; return its exit status.

    ``while_running`` is called twice a second. When this process is interrupted, the job gets SIGTERM and time to save
    before the interruption continues; when this process is killed, the kernel sends the job the same signal.

    Raises:
        JobError: If it ends with a status that is not ``accepted``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        start = output.tell()
        with _job(command, output, environment or {}) as job:
            while job.poll() is None:
                while_running()
                time.sleep(POLL_SECONDS)
            while_running()
    if job.returncode not in accepted:
        raise JobError(f"{_complaint(log, start)} (exit status {job.returncode}; the whole log is {log}).")
    return job.returncode


@contextmanager
def _job(
    command: Sequence[str], output: BinaryIO, environment: Mapping[str, str]
) -> "Iterator[subprocess.Popen[bytes]]":
    """Start ``command`` in a session of its own; it is ended with the block."""
    held_before, job = _hold_interruptions(), None
    try:
        job = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            start_new_session=True,
            close_fds=False,  # what this process marked inheritable, the folder's lock, is the job's too
            preexec_fn=partial(_begin_child, held_before),
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, held_before)
        yield job
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_before)
        if job is not None:
            _end(job)


class MetricsFollower:
    """Shows how far the job is that writes ``metrics.jsonl`` in ``folder``; call it now and then."""

    def __init__(self, folder: Path, total: int, description: str, *, stream: TextIO | None = None) -> None:
        """``total`` steps are expected; what an earlier run wrote before now is not counted as progress."""
        self._folder, self._total, self._description, self._stream = folder, total, description, stream
        self._progress: Progress | None = None
        self._before = self._last_row()
        self._step = 0

    def __call__(self) -> None:
        row = self._last_row()
        if row is None or row == self._before:
            return
        step = int(row["step"])
        if self._progress is None:  # the clock starts with the first step, not with the processes
            self._progress = Progress(self._total, step, self._description, stream=self._stream)
        elif step > self._step:
            values = {name: row[name] for name in ("loss", "tokens_per_second") if row.get(name) is not None}
            self._progress.update(step - self._step, **values)
        self._step = step

    def _last_row(self) -> dict[str, Any] | None:
        rows = read_metrics(self._folder) if (self._folder / METRICS_FILE).exists() else []
        return next((row for row in reversed(rows) if "loss" in row), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.close()


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that jobs are ended and not left behind."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end(job: "subprocess.Popen[bytes]") -> None:
    if job.poll() is None:
        job.terminate()
        try:
            job.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def _complaint(log: Path, start: int) -> str:
    """Return the line of the log, from byte ``start`` on, that most likely says what went wrong."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    patterns = (r"\bERROR (?!.*elastic)(.*)", r"megatron-ads: (.*)", r"((?:\w+\.)*\w*(?:Error|Exception)\b: .*)")
    found = (match[1] for pattern in patterns for line in lines if (match := re.search(pattern, line)))
    return next(found, lines[-1] if lines else "it printed nothing").rstrip(".")


def start_torchrun(command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start torchrun with everything that is inheritable, the lock on the folders included.

    When this process is killed, torchrun gets SIGTERM: the ranks have 30 s to save.
    """
    held_before = _hold_interruptions()
    try:
        begin = partial(_begin_child, held_before)
        return subprocess.Popen(command, env=environment, close_fds=False, preexec_fn=begin)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_before)


def _hold_interruptions() -> set[signal.Signals]:
    """Hold interruptions back, which Python forgets if they come while it forks; return what was held before."""
    return set(map(signal.Signals, signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))))


def _begin_child(held_before: set[signal.Signals]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_SETMASK, held_before)


def wait_passing_signals_on(job: "subprocess.Popen[bytes]") -> int:
    """Wait for torchrun; pass signals that ask for a stop on to its ranks.

    Not to torchrun, which would kill the ranks 30 s later: too short for a large checkpoint. That is what a second
    Ctrl-C does.

    Raises:
        KeyboardInterrupt: If a signal came while there were no ranks; torchrun has ended.
    """
    received, without_ranks = list[int](), False

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal without_ranks
        received.append(number)
        interrupts, ranks = received.count(signal.SIGINT), children(job.pid)
        without_ranks |= not ranks
        if received == [signal.SIGINT] and ranks:
            print("megatron-ads: stops after this step, with a checkpoint; Ctrl-C again ends it now", file=sys.stderr)
        if not ranks or interrupts > 1:
            ranks, number = [job.pid], signal.SIGTERM
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        status = job.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if without_ranks:
        raise KeyboardInterrupt
    return status


def children(pid: int) -> list[int]:
    """Return the processes that ``pid`` has started and that are still there; none where Linux's /proc is missing."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in file.read_text().split()]
    return found
