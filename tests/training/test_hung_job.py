"""A real job: undisturbed it is silent; a slow rank is named, and so is one that hangs, which ends it."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from megatron_ads.runtime.health.rank_record import ExitStatus
from parity_tests.harness.real_job import RealJob, two_rank_job

TIMEOUT = 8
PATIENCE = 300
"""Seconds for what a busy machine does slowly; none passes where all is well."""
SLOW = "holds up the job"


@pytest.fixture
def job(tmp_path: Path) -> Iterator[RealJob]:
    with two_rank_job(tmp_path, steps=100_000, save_every=100_000, timeout_seconds=TIMEOUT) as job:
        yield job


def _wait_until(job: RealJob, condition: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while condition not in job.logs():
        assert time.monotonic() < deadline and job.processes[0].poll() is None, job.logs()
        time.sleep(0.2)


def _wait_for_steps(job: RealJob, count: int) -> None:
    deadline, goal = time.monotonic() + PATIENCE, max(job.losses(), default=0) + count
    while max(job.losses(), default=0) < goal:
        assert time.monotonic() < deadline and job.processes[0].poll() is None, job.logs()
        time.sleep(0.1)


@contextmanager
def _slowed_down(job: RealJob, rank: int) -> Iterator[None]:
    """Let a rank run for a quarter of the time only."""
    done = threading.Event()

    def pulse() -> None:
        while not done.is_set():
            job.processes[rank].send_signal(signal.SIGSTOP)
            time.sleep(0.06)
            job.processes[rank].send_signal(signal.SIGCONT)
            time.sleep(0.02)

    thread = threading.Thread(target=pulse)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_slow_rank_and_a_hung_one_are_named_and_an_undisturbed_job_is_silent(job: RealJob) -> None:
    job.start_ranks()
    _wait_for_steps(job, 8)
    assert SLOW not in job.logs()
    assert not (job.root / "hang.json").exists()

    with _slowed_down(job, 1):
        _wait_until(job, SLOW)
    assert "WARNING rank 1 (stage 0) on " in job.logs()

    _wait_for_steps(job, 2)
    job.processes[1].send_signal(signal.SIGSTOP)
    # The communication's own timeout, had it come first, would have ended the rank with another status. How soon the
    # process is gone depends on the machine's load; it raises after this long.
    assert job.processes[0].wait(PATIENCE) == ExitStatus.HUNG
    report = json.loads((job.root / "hang.json").read_text())
    assert report["culprits"] == [1]
    assert "rank 1 (stage 0) on " in report["headline"] and "its process is stopped" in report["headline"]
    assert report["headline"] in job.log(0).read_text()
    assert report["seconds_without_progress"] >= 0.75 * TIMEOUT
    with suppress(ProcessLookupError):
        job.processes[1].send_signal(signal.SIGCONT)
    assert job.processes[1].wait(PATIENCE) == ExitStatus.HUNG  # it hears of it when it wakes up
