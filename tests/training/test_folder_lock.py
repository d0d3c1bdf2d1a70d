"""Two jobs never work in one folder, and what a dead job left is in nobody's way."""

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TextIO

import pytest

from megatron_ads.errors import ConfigError
from megatron_ads.runtime.health.rank_record import ExitStatus
from megatron_ads.training import folder_lock
from megatron_ads.training.folder_lock import LOCK_FILE, Holder, hold, require_free
from parity_tests.harness.real_job import RealJob, write_small_model

HERE = {"host": socket.gethostname(), "pid": 12345, "since": "2026-01-02 03:04:05"}
ELSEWHERE = HERE | {"host": "elsewhere"}
HOLDER = """
import sys, pathlib
from megatron_ads.training.folder_lock import hold
with hold({"log.dir": pathlib.Path(sys.argv[1])}, {}):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def alive(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_living_job_is_named_and_one_that_ends_leaves_nothing(alive: "subprocess.Popen[str]", tmp_path: Path) -> None:
    for refused in (
        lambda: hold({"log.dir": tmp_path}, {}).__enter__(),
        lambda: require_free({"log.dir": tmp_path}, {}),
    ):
        with pytest.raises(ConfigError) as caught:
            refused()
        told = str(caught.value)
        assert told.startswith(
            f"log.dir {tmp_path} is in use by another job: process {alive.pid} on {HERE['host']}, since"
        )
        assert "delete" not in told and "\n" not in told
    alive.communicate()
    assert not (tmp_path / LOCK_FILE).exists()
    with hold({"log.dir": tmp_path, "checkpoint.dir": tmp_path}, {}):  # one folder for both is one lock
        pass
    assert [*tmp_path.iterdir()] == []


def test_a_job_that_was_killed_is_taken_over(alive: "subprocess.Popen[str]", tmp_path: Path) -> None:
    alive.kill()
    alive.wait()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == alive.pid
    require_free({"log.dir": tmp_path}, {})
    with hold({"log.dir": tmp_path}, {}):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_what_the_launcher_started_keeps_the_folder_when_that_is_killed(tmp_path: Path) -> None:
    starting = HOLDER.replace(
        "    print", "    import subprocess; subprocess.Popen(['cat'], close_fds=False)\n    print"
    )
    command = [sys.executable, "-c", starting, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None and launcher.stdout.readline() == "held\n"
        launcher.kill()
        launcher.wait()
        with _refused():
            require_free({"log.dir": tmp_path}, {})
        assert launcher.stdin is not None
        launcher.stdin.close()  # what it started ends
        launcher.stdout.read()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # it closes its output before the lock
        with suppress(ConfigError):
            require_free({"log.dir": tmp_path}, {})
            break
        time.sleep(0.05)
    require_free({"log.dir": tmp_path}, {})


def _squeue(folder: Path, script: str) -> None:
    folder.mkdir()
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)


def _refused() -> "pytest.RaisesExc[ConfigError]":
    return pytest.raises(ConfigError, match="is in use by another job")


@pytest.mark.parametrize(
    ("content", "environment", "squeue", "free"),
    [
        (HERE, {}, None, True),
        (ELSEWHERE, {}, None, False),
        (ELSEWHERE | {"slurm_job": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, None, True),  # requeued
        (ELSEWHERE | {"slurm_job": "7"}, {"SLURM_JOB_ID": "8"}, None, False),
        (ELSEWHERE | {"slurm_job": "7"}, {"SLURM_JOB_ID": "8"}, "echo RUNNING", False),
        (ELSEWHERE | {"slurm_job": "7"}, {"SLURM_JOB_ID": "8"}, "echo TIMEOUT", True),
        (ELSEWHERE | {"slurm_job": "7"}, {}, "echo 'Invalid job id specified' >&2; exit 1", True),
        (ELSEWHERE | {"slurm_job": "7"}, {}, "echo 'slurm is down' >&2; exit 1", False),
        (ELSEWHERE | {"slurm_job": "7_2"}, {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2",
                                            "SLURM_RESTART_COUNT": "1"}, None, True),
        (ELSEWHERE | {"rendezvous": "a:1"}, {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
         None, True),  # node 0 of the same job
        (ELSEWHERE | {"rendezvous": "a:1"}, {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "b", "MASTER_PORT": "1"},
         None, False),
        ("", {}, None, True),
        ("not JSON", {}, None, True),
    ],
)  # fmt: skip
def test_who_may_take_a_folder_over(
    content: object, environment: dict[str, str], squeue: str | None, free: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    if squeue is not None:
        _squeue(tmp_path / "bin", squeue)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with nullcontext() if free else _refused() as caught:
        require_free({"log.dir": run}, environment)
    if not free:
        assert f"cannot be seen from here, delete {run / LOCK_FILE}" in str(caught.value)


def test_a_check_that_waits_for_slurm_does_not_keep_a_job_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK_FILE).write_text(json.dumps(ELSEWHERE | {"slurm_job": "7"}))
    has_lock = []

    def slurm_has_ended(job: str | None) -> bool:
        with (tmp_path / LOCK_FILE).open("a") as starting:
            fcntl.flock(starting, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_lock.append(job)
        return True

    monkeypatch.setattr(folder_lock, "_slurm_has_ended", slurm_has_ended)
    require_free({"log.dir": tmp_path}, {})
    assert has_lock == ["7"]


def test_a_lock_whose_job_ends_between_two_looks_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_holder = folder_lock._other_holder

    def ends(file: TextIO, me: Holder) -> object:
        if not ended:
            ended.append(True)
            (tmp_path / LOCK_FILE).unlink()
        return other_holder(file, me)

    ended: list[bool] = []
    monkeypatch.setattr(folder_lock, "_other_holder", ends)
    with hold({"log.dir": tmp_path}, {}):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_lock_that_cannot_be_deleted_is_a_warning_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, **_: bool) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with hold({"log.dir": tmp_path}, {}):
        monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.undo()
    assert f"{tmp_path / LOCK_FILE} cannot be deleted (Permission denied)" in caplog.text
    with hold({"log.dir": tmp_path}, {}):
        pass


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"log\.dir .* cannot be written: .*\. Choose another"):
        hold({"log.dir": tmp_path / "file" / "run"}, {}).__enter__()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[list[RealJob]]:
    model = write_small_model(tmp_path / "model")
    layout = {"pp": 1, "ep": 1}
    jobs = [
        RealJob(model=model, root=tmp_path / name, ranks=1, layout=layout, steps=3000, save_every=3000,
                overrides=[f"log.dir={tmp_path / 'run'}"])
        for name in ("run", "launched", "bare")
    ]  # fmt: skip
    yield jobs
    for job in jobs:
        job.kill()


@pytest.mark.slow
def test_a_second_job_in_a_folder_is_refused_at_once_and_the_first_never_hears_of_it(
    jobs: list[RealJob], tmp_path: Path
) -> None:
    first, launched, bare = jobs
    run = tmp_path / "run"
    first.start_launcher()
    deadline = time.monotonic() + first.longest_wait
    while not first.losses():
        assert time.monotonic() < deadline and first.processes[0].poll() is None, first.logs()
        time.sleep(0.1)
    partial = run / "checkpoints" / ".step-00003000.partial"
    partial.mkdir(parents=True)  # as if the first were saving
    launched.start_launcher()
    bare.start_ranks(forked=True)
    assert launched.wait(100) == bare.wait(100) == [2], launched.logs() + bare.logs()
    for other in (launched, bare):
        assert f"log.dir {run} is in use by another job: process {first.processes[0].pid} on " in other.logs()
    assert partial.exists()
    first.processes[0].send_signal(signal.SIGTERM)
    assert first.wait(100) == [ExitStatus.STOPPED], first.logs()
    assert json.loads((run / "outcome.json").read_text()) == {"outcome": "stopped", "step": max(first.losses())}
    assert not (run / LOCK_FILE).exists()


@pytest.mark.parametrize(("pid", "free"), [(os.getpid(), False), (2**22 + 1, True)], ids=["running", "dead"])
def test_without_locks_of_the_file_system_a_process_of_this_machine_is_looked_for(
    pid: int, free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / LOCK_FILE).write_text(json.dumps(HERE | {"pid": pid}))
    with nullcontext() if free else _refused():
        require_free({"log.dir": tmp_path}, {})
    assert json.loads((tmp_path / LOCK_FILE).read_text()) == HERE | {"pid": pid}  # only looked at
