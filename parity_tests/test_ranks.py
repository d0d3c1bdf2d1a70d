"""The processes that distributed tests run on."""

import subprocess
import time

import psutil

from parity_tests.harness.ranks import run_ranks


def _start_another() -> int:
    return subprocess.Popen(["sleep", "600"]).pid


def _runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_rank_has_started_ends_with_it() -> None:
    (process,) = run_ranks(1, _start_another, process_group=False)
    deadline = time.monotonic() + 10
    while _runs(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(process)
