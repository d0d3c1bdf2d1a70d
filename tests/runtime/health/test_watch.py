"""Four real ranks that stop getting on: the cause is named within the timeout, and every rank ends with the report.

Each case has a twin that is merely slow and must be left alone.
"""

import ctypes
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.health.activity import Activity, name_failed_communication
from megatron_ads.runtime.health.peers import PeerMonitor
from megatron_ads.runtime.health.rank_record import ExitStatus
from megatron_ads.runtime.health.watch import HangWatch
from parity_tests.harness.ranks import RanksFailed, run_ranks

TIMEOUT = 3.0
LONG = 60.0
BRIEF = 0.3 * TIMEOUT
"""A pause that nobody may take for a hang."""

Pause = Callable[[float], object]


def _watched(folder: str, layout: ParallelLayout, work: Callable[[Activity], object]) -> str:
    """Run ``work`` as a training step is run; return "done" if it is left alone."""
    process_groups.start(layout, timeout_seconds=TIMEOUT)
    activity = Activity()
    hangs = HangWatch(activity, layout, dist.get_rank(), timeout_seconds=TIMEOUT, directory=Path(folder))
    with PeerMonitor(layout, hangs=hangs), name_failed_communication(layout, activity):
        dist.barrier()
        work(activity)
        dist.barrier()
        assert threading.active_count() == 2
    return "done"


def _pause_in_python(seconds: float) -> None:
    time.sleep(seconds)


def _pause_in_c_code(seconds: float) -> None:
    ctypes.CDLL(None).usleep(int(seconds * 1e6))


def _pause_in_c_code_that_keeps_the_lock(seconds: float) -> None:
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def _pause_by_a_signal(seconds: float) -> None:
    """Stop this process; after a pause that ends, a child continues it."""
    parent = os.getpid()
    if seconds < LONG and os.fork() == 0:
        time.sleep(seconds)
        os.kill(parent, signal.SIGCONT)
        os._exit(0)
    os.kill(parent, signal.SIGSTOP)


PAUSES: tuple[Pause, ...] = (
    _pause_in_python, _pause_in_c_code, _pause_in_c_code_that_keeps_the_lock, _pause_by_a_signal
)  # fmt: skip


def _stay_away_from_an_expert_collective(folder: str) -> str:
    """Ranks 2 and 3 are the expert-parallel group of stage 1."""

    def work(activity: Activity) -> None:
        from megatron.core import parallel_state

        activity.enter_step(7)
        if dist.get_rank() == 3:
            _pause_in_c_code(LONG)
        dist.all_reduce(torch.ones(3), group=parallel_state.get_expert_model_parallel_group())

    return _watched(folder, ParallelLayout(world=4, pp=2, ep=2), work)


def _fall_silent(folder: str, pause: Pause) -> str:
    def work(activity: Activity) -> None:
        if dist.get_rank() == 1:
            _be_killed_after(TIMEOUT + 2)  # as the launcher would, when the others have ended
            pause(LONG)
        dist.all_reduce(torch.ones(3))

    return _watched(folder, ParallelLayout(world=2, pp=2), work)


def _be_killed_after(seconds: float) -> None:
    parent = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(parent, signal.SIGKILL)
        os._exit(0)


def _pause_briefly_in_every_way(folder: str) -> str:
    def work(activity: Activity) -> None:
        activity.enter_step(7)
        for pause in PAUSES:
            if dist.get_rank() == 1:
                pause(BRIEF)
            dist.all_reduce(torch.ones(3))

    return _watched(folder, ParallelLayout(world=2), work)


def _report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "hang.json").read_text())
    assert (folder / "hang.txt").read_text().startswith(report["headline"])
    assert 0.5 * TIMEOUT < report["seconds_without_progress"] < TIMEOUT
    return report


def _hang(world: int, function: Callable[..., Any], *args: Any) -> dict[int, str]:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(world, function, *args)
    return caught.value.failures


def test_a_rank_that_stays_away_is_named_with_its_line_its_stage_and_the_collective(tmp_path: Path) -> None:
    failures = _hang(4, _stay_away_from_an_expert_collective, str(tmp_path))
    report = _report(tmp_path)
    line = _pause_in_c_code.__code__.co_firstlineno + 1
    said = report["headline"]
    assert said.startswith(f"the job hangs: rank 3 (stage 1) on {os.uname().nodename}, pid ")
    assert f"is not in a communication but at tests/runtime/health/test_watch.py:{line} in _pause_in_c_code, " in said
    assert (
        "in step 7; waiting for it: rank 2 (stage 1) in allreduce(float32[3]; sum) of expert_model_parallel[2, 3], and "
        "ranks 0-1 (stage 0) in barrier() of default[0, 1, 2, 3]"
    ) in said
    assert report["culprits"] == [3] and report["silent"] == []
    assert [rank["rank"] for rank in report["ranks"] if rank["wait"]] == [0, 1, 2]
    assert sorted(failures) == [0, 1, 2, 3]
    for failure in failures.values():
        assert failure.startswith(f"died with exit status {int(ExitStatus.HUNG)}")
        assert "rank 3 (stage 1)" in failure


@pytest.mark.parametrize(
    ("pause", "why"),
    [
        (_pause_by_a_signal, "its process is stopped"),
        (_pause_in_c_code_that_keeps_the_lock, "its process sleeps in C code that keeps the interpreter lock"),
    ],
)
def test_a_rank_that_cannot_answer_is_named_by_the_others(tmp_path: Path, pause: Pause, why: str) -> None:
    failures = _hang(2, _fall_silent, str(tmp_path), pause)
    report = _report(tmp_path)
    assert f"rank 1 (stage 1) on {os.uname().nodename}, pid " in report["headline"]
    assert f"does not answer ({why}); waiting for it: rank 0 (stage 0) in allreduce(float32[3]" in report["headline"]
    assert report["culprits"] == report["silent"] == [1]
    assert failures[0].startswith(f"died with exit status {int(ExitStatus.HUNG)}")
    if pause is _pause_in_c_code_that_keeps_the_lock:  # its stack is in its own output, written without the lock
        assert f"in {pause.__name__}" in failures[1].partition("its output ended with")[2]


def test_brief_pauses_are_left_alone(tmp_path: Path) -> None:
    assert run_ranks(2, _pause_briefly_in_every_way, str(tmp_path)) == ["done"] * 2
    assert list(tmp_path.iterdir()) == []


def _wait_for_each_other(folder: str, in_a_circle: bool) -> str:
    def work(activity: Activity) -> None:
        rank, tensor = dist.get_rank(), torch.ones(2)
        if rank == 0 and not in_a_circle:
            dist.send(tensor, 1)
        dist.recv(tensor, (rank - 1) % 3)
        if rank > 0 or in_a_circle:
            dist.send(tensor, (rank + 1) % 3)

    return _watched(folder, ParallelLayout(world=3), work)


def test_ranks_that_wait_for_each_other_are_all_named(tmp_path: Path) -> None:
    _hang(3, _wait_for_each_other, str(tmp_path), True)
    report = _report(tmp_path)
    assert sorted(report["circle"]) == [0, 1, 2] and report["culprits"] == []
    assert "rank 1 (stage 0) waits in recv(float32[2]; from rank 0) of default[0, 1, 2]" in report["headline"]


def test_messages_that_go_around_are_left_alone(tmp_path: Path) -> None:
    assert run_ranks(3, _wait_for_each_other, str(tmp_path), False) == ["done"] * 3
    assert list(tmp_path.iterdir()) == []


def _stand_still_in_a_step(folder: str) -> str:
    os.environ["TORCH_FR_BUFFER_SIZE"] = "100"

    def work(activity: Activity) -> None:
        activity.enter_step(3)
        time.sleep(LONG)

    return _watched(folder, ParallelLayout(world=2), work)


def test_ranks_that_all_stand_still_in_a_step_are_named(tmp_path: Path) -> None:
    _hang(2, _stand_still_in_a_step, str(tmp_path))
    assert _report(tmp_path)["culprits"] == [0, 1]
    flights = [pickle.loads((tmp_path / f"flight_{rank}").read_bytes()) for rank in range(2)]
    assert all("pg_config" in flight for flight in flights)


def _get_on_without_communication(folder: str) -> str:
    def work(activity: Activity) -> None:
        activity.enter_step(3)
        for _ in range(3):
            activity.moved()
            time.sleep(BRIEF)
        activity.leave_step(3)
        time.sleep(0.9 * TIMEOUT)

    return _watched(folder, ParallelLayout(world=2), work)


def test_a_step_that_gets_on_and_the_time_between_steps_may_be_long(tmp_path: Path) -> None:
    assert run_ranks(2, _get_on_without_communication, str(tmp_path)) == ["done"] * 2
    assert list(tmp_path.iterdir()) == []


def test_an_end_is_recorded_even_if_torchs_record_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    (tmp_path / "file").touch()
    ends: list[str] = []
    layout, folder = ParallelLayout(world=1), tmp_path / "file" / "log"
    watch = HangWatch(Activity(), layout, 0, timeout_seconds=TIMEOUT, directory=folder, on_hang=ends.append)
    watch.ends("the job hangs")
    assert ends == ["the job hangs"]
