"""Work spread over processes: counted, reported, and ended cleanly when a worker or the caller dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conversion.workers import run_all
from megatron_ads.errors import ConversionError


def _double(number: int, advance) -> int:
    advance(number)
    return 2 * number


def _refuse(number: int, advance) -> int:
    raise ConversionError(f"{number} cannot be done")


def _die(number: int, advance) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_every_piece_is_done_once_and_counted(workers):
    counted: list[int] = []
    results = list(run_all(_double, range(1, 6), workers=workers, advance=counted.append))
    assert sorted(results) == [2, 4, 6, 8, 10]
    assert sum(counted) == 15


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_is_the_callers(workers):
    with pytest.raises(ConversionError, match="cannot be done"):
        list(run_all(_refuse, [1, 2], workers=workers, advance=lambda _: None))


def test_a_killed_worker_is_an_error_that_names_the_likely_cause():
    with pytest.raises(ConversionError, match="ran out of memory"):
        list(run_all(_die, [1, 2], workers=2, advance=lambda _: None))


_SLOW = """
import os, sys, time
from conversion.workers import run_all
def slow(number, advance):
    open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
    time.sleep(600)
if __name__ == "__main__":
    list(run_all(slow, [1, 2], workers=2, advance=lambda _: None))
"""


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_leave_when_their_caller_is_killed(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(_SLOW)
    (tmp_path / "pids").mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    caller = subprocess.Popen([sys.executable, str(script), str(tmp_path / "pids")], env=environment)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "pids").iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = [int(file.name) for file in (tmp_path / "pids").iterdir()]
    caller.kill()
    caller.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(map(_is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_is_running, workers))
