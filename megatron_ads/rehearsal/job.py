"""A job in processes of its own: its output goes to a log file, its metrics to a progress bar."""

import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ads.errors import MegatronAdsError
from megatron_ads.observability.metrics import METRICS_FILE, read_metrics
from megatron_ads.observability.progress import Progress

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
    while_running: Callable[[], None] = lambda: None,
) -> int:
    """Run ``command`` to its end, its output appended to ``log``; return its exit status.

    ``while_running`` is called twice a second.

    When this process is interrupted, the job gets SIGTERM and time to save before the interruption goes on;
    when this process is killed, the kernel sends the job the same signal.

    Raises:
        JobError: If it ends with a status that is not ``accepted``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        start = output.tell()
        job = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            while job.poll() is None:
                while_running()
                time.sleep(POLL_SECONDS)
            while_running()
        finally:
            _end(job)
    if job.returncode not in accepted:
        raise JobError(f"{_complaint(log, start)} (exit status {job.returncode}; the whole log is {log}).")
    return job.returncode


def follow_metrics(folder: Path, progress: Progress, already_done: int) -> Callable[[], None]:
    """Return a function that moves ``progress`` on to the last step that ``folder``'s metrics tell of."""
    done = already_done

    def follow() -> None:
        nonlocal done
        rows = [row for row in read_metrics(folder) if "loss" in row] if (folder / METRICS_FILE).exists() else []
        if rows and (step := int(rows[-1]["step"])) > done:
            shown = ("loss", "tokens_per_second")
            progress.update(step - done, **{name: rows[-1][name] for name in shown if rows[-1].get(name) is not None})
            done = step

    return follow


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(job: "subprocess.Popen[bytes]") -> None:
    """Make sure that no process of the job is left."""
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
    for pattern in (r"\bERROR (?!.*elastic)(.*)", r"megatron-ads: (.*)", r"((?:\w+\.)*\w*(?:Error|Exception)\b: .*)"):
        for line in lines:
            if match := re.search(pattern, line):
                return match[1].rstrip(".")
    return lines[-1].rstrip(".") if lines else "it said nothing"
