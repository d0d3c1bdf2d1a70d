"""A log disk that is full is named, and the job ends as one that the user has to help."""

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ads.errors import CheckpointError, ConversionError, DiskFullError
from megatron_ads.runtime.health.rank_record import (
    FOLDER_VARIABLE,
    ExitStatus,
    forget_record,
    read_records,
    write_record,
)
from megatron_ads.training.checkpoint_errors import failed_log_named
from parity_tests.harness.real_job import RealJob, two_rank_job
from tests.training.small_disk import small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    with small_disk(tmp_path / "disk", megabytes=48) as mount:
        yield mount


def _fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), DiskFullError("as a conversion")])
def test_what_the_system_refuses_is_named_with_its_reason(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught, failed_log_named(tmp_path):
        raise error
    assert str(caught.value).startswith(f"log.dir {tmp_path} cannot be written: No space left on device; ")
    assert "conversion" not in str(caught.value)


@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "by a tracker"), ConversionError("a shape")])
def test_what_is_not_the_disks_keeps_its_own_words(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, failed_log_named(tmp_path):
        raise error
    assert caught.value is error


def test_a_rank_can_say_how_it_ended_on_a_full_disk(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(disk / "records"))
    forget_record(0)
    _fill(disk)
    write_record(0, ExitStatus.USER_ERROR, "the reason, " * 500)
    (record,) = read_records(disk / "records")
    assert (record.status, record.message) == (ExitStatus.USER_ERROR, "the reason, " * 500)


@pytest.fixture
def job(disk: Path, tmp_path: Path) -> Iterator[RealJob]:
    overrides = ["checkpoint.save_total_limit=1"]
    with two_rank_job(tmp_path, root=disk / "run", steps=3000, save_every=3000, overrides=overrides) as job:
        yield job


@pytest.mark.slow
def test_a_job_whose_log_disk_fills_names_it_and_is_not_started_again(job: RealJob, disk: Path, tmp_path: Path) -> None:
    job.overrides += [f"checkpoint.dir={tmp_path / 'checkpoints'}"]
    job.log = lambda who: tmp_path / f"output-{who}.txt"  # type: ignore[method-assign]
    job.start_launcher()
    deadline = time.monotonic() + job.longest_wait
    while max(job.losses(), default=0) < 2:
        assert time.monotonic() < deadline and job.processes[0].poll() is None
        time.sleep(0.1)
    _fill(disk)
    assert job.wait(100) == [2]
    said = [line for line in (tmp_path / "output-launcher.txt").read_text().splitlines() if "megatron-ads: " in line]
    assert f"log.dir {disk / 'run'} cannot be written: No space left on device; " in said[0]
    assert "Make room, or choose another log.dir" in said[0] and "conversion" not in said[0]
