"""The processes that distributed tests run on: none outlives its call."""

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from parity_tests.harness.ranks import RanksFailed, run_ranks


def _start_another(told: Path) -> None:
    told.write_text(str(subprocess.Popen(["sleep", "600"]).pid))


def _start_another_and_die(told: Path) -> None:
    _start_another(told)
    os._exit(1)


def _runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _assert_ends(process: int) -> None:
    deadline = time.monotonic() + 10
    while _runs(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(process)


def test_what_a_rank_has_started_ends_with_it(tmp_path: Path) -> None:
    run_ranks(1, _start_another, tmp_path / "process", process_group=False)
    _assert_ends(int((tmp_path / "process").read_text()))


def test_what_a_rank_has_started_ends_with_it_when_it_dies(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="died with exit status 1"):
        run_ranks(1, _start_another_and_die, tmp_path / "process", process_group=False)
    _assert_ends(int((tmp_path / "process").read_text()))
