import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_ads.launching.processes import (
    JobError,
    MetricsFollower,
    children,
    run_job,
    wait_passing_signals_on,
)
from megatron_ads.observability.metrics import METRICS_FILE


def _python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def _wait_for(file: Path) -> str:
    give_up = time.monotonic() + 30
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < give_up, f"{file} did not appear within 30 s"
        time.sleep(0.02)
    return file.read_text()


def test_output_goes_to_the_log(tmp_path: Path) -> None:
    run_job(_python("import sys; print('out'); print('err', file=sys.stderr)"), tmp_path / "logs" / "job.log")
    assert (tmp_path / "logs" / "job.log").read_text() == "out\nerr\n"


@pytest.mark.parametrize(
    ("output", "quoted"),
    [
        ("14:00:01 [rank 2 of 4] ERROR layout.pp is 3.\\nTraceback\\nX: y", "layout.pp is 3 (exit"),
        ("megatron-ads: model.load is missing.", "model.load is missing (exit"),
        ("Traceback\\ntorch.cuda.OutOfMemoryError: too big\\nbye", "torch.cuda.OutOfMemoryError: too big (exit"),
        ("nothing of note", "nothing of note (exit"),
        ("", "it printed nothing (exit"),
    ],
)
def test_a_failed_job_is_quoted_in_one_line(tmp_path: Path, output: str, quoted: str) -> None:
    log = tmp_path / "job.log"
    log.write_text("ERROR of an earlier run\n")
    with pytest.raises(JobError) as error:
        run_job(_python(f"print('''{output}'''); raise SystemExit(7)"), log)
    assert str(error.value).startswith(quoted)
    assert str(error.value).endswith(f"(exit status 7; the whole log is {log}).")


def test_an_interrupted_job_may_save_before_it_ends(tmp_path: Path) -> None:
    saved, started = tmp_path / "saved", tmp_path / "started"
    job = f"""
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path({str(saved)!r}).write_text("yes"); sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(started)!r}).write_text("yes")
time.sleep(60)
"""

    def interrupt_once_started() -> None:
        if started.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(_python(job), tmp_path / "job.log", while_running=interrupt_once_started)
    assert saved.read_text() == "yes"


@pytest.mark.parametrize("start", ["run_job([{job}], Path({log}))", "start_torchrun([{job}], os.environ).wait()"])
def test_a_job_does_not_outlive_a_killed_driver(tmp_path: Path, start: str) -> None:
    pid_file = tmp_path / "pid"
    job = f"import os, pathlib, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    call = start.format(job=f"sys.executable, '-c', {job!r}", log=repr(str(tmp_path / "job.log")))
    driver = f"""
import os, sys
from pathlib import Path
from megatron_ads.launching.processes import run_job, start_torchrun
{call}
"""
    with subprocess.Popen(_python(driver), start_new_session=True) as process:
        pid = int(_wait_for(pid_file))
        process.send_signal(signal.SIGKILL)
    give_up = time.monotonic() + 10
    while _runs(pid):
        assert time.monotonic() < give_up, "the job still runs 10 s after its driver was killed"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _write_metrics(folder: Path, steps: range, mode: str = "w") -> None:
    with (folder / METRICS_FILE).open(mode) as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": 1.0 / step}) + "\n")
            file.write(json.dumps({"step": step, "checkpoint_seconds": 0.1}) + "\n")


def test_progress_follows_the_metrics(tmp_path: Path) -> None:
    log = io.StringIO()
    with MetricsFollower(tmp_path, 4, "sft", stream=log) as follow:
        follow()
        _write_metrics(tmp_path, range(1, 2))
        follow()
        assert log.getvalue() == ""  # one step says nothing about speed
        _write_metrics(tmp_path, range(2, 5), mode="a")
        follow()
        follow()
    assert log.getvalue().startswith("sft 4/4, loss 0.25")
    assert log.getvalue().count("\n") == 1


def test_what_an_interrupted_run_wrote_is_not_progress(tmp_path: Path) -> None:
    _write_metrics(tmp_path, range(1, 4))  # killed behind its checkpoint at step 1
    log = io.StringIO()
    with MetricsFollower(tmp_path, 4, "sft", stream=log) as follow:
        follow()
        _write_metrics(tmp_path, range(1, 3))  # resumed from step 1, now at 2
        follow()
        _write_metrics(tmp_path, range(3, 5), mode="a")
        follow()
    assert log.getvalue().count("\n") == 1
    assert log.getvalue().startswith("sft 4/4")


def test_no_process_is_left_when_a_job_ignores_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ads.launching.processes.GRACE_SECONDS", 0.5)
    pid_file = tmp_path / "pid"
    job = f"""
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))
time.sleep(60)
"""

    def interrupt_once_started() -> None:
        if pid_file.exists() and pid_file.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(_python(job), tmp_path / "job.log", while_running=interrupt_once_started)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_the_children_of_a_process_are_found() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in children(os.getpid())
        child.communicate()


def test_a_termination_while_the_job_is_started_ends_it(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, signal
from megatron_ads.launching.processes import run_job, termination_as_interrupt
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
try:
    with termination_as_interrupt():
        run_job(["sleep", "60"], pathlib.Path({str(tmp_path / "log")!r}))
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run(_python(code), capture_output=True, text=True, timeout=50, check=False)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


_RANK = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: pathlib.Path(sys.argv[1]).write_text("stopped") and os._exit(0))
pathlib.Path(sys.argv[1]).write_text("started")
time.sleep(60)
"""
"""Stops when it is asked to."""


def _interrupted_torchrun(tmp_path: Path, *, interrupts: int, rank: str) -> tuple[int, str]:
    """Run ``rank`` under torchrun, press Ctrl-C as a terminal sends it; return torchrun's status and stderr."""
    (tmp_path / "rank.py").write_text(rank)
    words = ["--standalone", "--nproc-per-node=1", "--signals-to-handle=SIGTERM", "rank.py", "said"]
    command = [sys.executable, "-m", "megatron_ads.launching.torchrun", *words]
    before = signal.signal(signal.SIGINT, lambda *_: None)  # one that comes too late does not end the tests
    try:
        with (
            (tmp_path / "log").open("wb") as log,
            subprocess.Popen(command, cwd=tmp_path, stderr=log, env={**os.environ, "PYTHONPATH": os.getcwd()}) as job,
            ThreadPoolExecutor() as pool,
        ):

            def press() -> None:
                _wait_for(tmp_path / "said")
                for _ in range(interrupts):
                    os.kill(job.pid, signal.SIGINT)  # it reaches every process of the terminal
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.5)

            pool.submit(press)
            status = wait_passing_signals_on(job)
    finally:
        signal.signal(signal.SIGINT, before)
    return status, (tmp_path / "log").read_text()


def test_a_rank_may_take_its_time_to_stop_after_the_first_interruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _interrupted_torchrun(tmp_path, interrupts=1, rank=_RANK) == (0, "")
    assert (tmp_path / "said").read_text() == "stopped"
    assert "Ctrl-C again" in capsys.readouterr().err


def test_a_second_interruption_ends_the_ranks_without_a_traceback(tmp_path: Path) -> None:
    status, log = _interrupted_torchrun(tmp_path, interrupts=2, rank=_RANK.replace("os._exit(0)", "None"))
    assert status == 0 and "Traceback" not in log


def test_a_failed_rank_has_the_only_traceback(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text("raise SystemExit(3)")
    words = ["--standalone", "--nproc-per-node=1", "rank.py"]
    command = [sys.executable, "-m", "megatron_ads.launching.torchrun", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_an_interruption_before_there_are_ranks_ends_torchrun() -> None:
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with subprocess.Popen(_python("input()"), stdin=subprocess.PIPE) as job:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                wait_passing_signals_on(job)
            assert job.returncode == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, before)
