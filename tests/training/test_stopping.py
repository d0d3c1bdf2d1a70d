"""A real job that is told to stop finishes its step, saves, says so by its exit status, and continues later."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ads.runtime.health.rank_record import ExitStatus
from parity_tests.harness.real_job import RealJob, write_small_model

STEPS = 400
"""More than two ranks do before the signal comes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("stop") / "model")


@pytest.fixture
def job(model: Path, tmp_path: Path) -> Iterator[RealJob]:
    job = RealJob(model=model, root=tmp_path / "run", ranks=2, layout={"pp": 1, "ep": 2}, steps=STEPS, save_every=STEPS)
    yield job
    job.kill()


def _wait_for_a_step_after(job: RealJob, step: int) -> None:
    deadline = time.monotonic() + 120
    while max(job.losses(), default=0) <= step:
        assert time.monotonic() < deadline and job.processes[0].poll() is None, job.logs()
        time.sleep(0.1)


def _last_step_saved(job: RealJob) -> int:
    last = max(job.losses())
    assert last < STEPS
    assert job.complete()[-1] == f"step-{last:08d}"
    assert json.loads((job.root / "outcome.json").read_text()) == {"outcome": "stopped", "step": last}
    return last


@pytest.mark.slow
def test_sigusr1_to_one_rank_and_sigterm_to_the_launcher_save_and_stop_the_job(job: RealJob) -> None:
    job.start_ranks(forked=True)
    _wait_for_a_step_after(job, 0)
    job.processes[1].send_signal(signal.SIGUSR1)
    assert job.wait(60) == [ExitStatus.STOPPED] * 2
    first = _last_step_saved(job)

    job.start_launcher()
    _wait_for_a_step_after(job, first)
    job.processes[0].send_signal(signal.SIGTERM)
    assert job.wait(60) == [ExitStatus.STOPPED]
    second = _last_step_saved(job)
    assert f"resumed from {job.checkpoints / f'step-{first:08d}'}, after step {first}" in job.logs()
    assert sorted(job.losses()) == list(range(1, second + 1))
