"""The checks of ``parity_tests.crash_test`` find what they are there to find."""

import json
import random
import zlib
from pathlib import Path

import pytest

from megatron_ads.runtime.health.rank_record import ExitStatus
from parity_tests.crash_test import (
    STEPS,
    BrokenPromiseError,
    Kill,
    check_checkpoints,
    check_resume,
    check_the_others,
    draw_kill,
)
from parity_tests.harness.real_job import RealJob

NAME = "step-00000002"
KILL = Kill(rank=1, phase="step", step=3, delay_seconds=0.0, under_launcher=False)


class FinishedJob(RealJob):
    """A job whose processes have come and gone: with ``statuses``, and ``output`` in the log."""

    statuses: tuple[int, ...] = (ExitStatus.DONE,) * 4
    output: str = ""

    def start_ranks(self, *, forked: bool = False) -> None:
        self.log(0).write_text(self.output)

    def wait(self, timeout: float) -> list[int]:
        return list(self.statuses)


def _job(root: Path, *, last_loss: float = 1.0, weights: bytes = b"weights") -> FinishedJob:
    job = FinishedJob(model=root / "model", root=root)
    folder = job.checkpoints / NAME
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"moments")
    (folder / "manifest.json").write_text(json.dumps({"files": {"data": {"crc32": zlib.crc32(b"moments")}}}))
    lines = [{"step": step, "loss": last_loss if step == STEPS else 2.0} for step in range(1, STEPS + 1)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "export").mkdir()
    (root / "export" / "pp00.safetensors").write_bytes(weights)
    job.output = f"resumed from {folder}, after step 2\n"
    return job


def test_a_whole_run_passes(tmp_path: Path) -> None:
    job = _job(tmp_path / "run")
    check_checkpoints([NAME], job)
    check_resume(job, _job(tmp_path / "undisturbed"))
    job.statuses = (ExitStatus.PEER_LOST, -9, ExitStatus.PEER_LOST, ExitStatus.PEER_LOST)
    job.log(0).write_text("rank 1 (stage 0) has gone (killed, or its machine lost), after step 3")
    check_the_others(KILL, job, 3)


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    job = _job(tmp_path / "run")
    (job.checkpoints / NAME / "data").write_bytes(b"momentz")
    with pytest.raises(BrokenPromiseError, match=r"damaged \{'step-00000002': \['data'\]\}"):
        check_checkpoints([NAME], job)


def test_a_lost_checkpoint_is_found(tmp_path: Path) -> None:
    with pytest.raises(BrokenPromiseError, match="lost \\['step-00000004'\\]"):
        check_checkpoints([NAME, "step-00000004"], _job(tmp_path / "run"))


def test_another_loss_in_the_last_bit_is_found(tmp_path: Path) -> None:
    with pytest.raises(BrokenPromiseError, match="the losses differ"):
        check_resume(_job(tmp_path / "run", last_loss=1.0000000000000002), _job(tmp_path / "undisturbed"))


def test_other_weights_are_found(tmp_path: Path) -> None:
    with pytest.raises(BrokenPromiseError, match="the exported weights differ"):
        check_resume(_job(tmp_path / "run", weights=b"weightz"), _job(tmp_path / "undisturbed"))


def test_a_start_from_the_beginning_is_found(tmp_path: Path) -> None:
    job = _job(tmp_path / "run")
    job.output = ""
    with pytest.raises(BrokenPromiseError, match="did not resume from step-00000002"):
        check_resume(job, _job(tmp_path / "undisturbed"))


def test_ranks_that_do_not_say_who_has_gone_are_found(tmp_path: Path) -> None:
    job = _job(tmp_path / "run")
    job.statuses = (ExitStatus.PEER_LOST, -9, ExitStatus.PEER_LOST, ExitStatus.PEER_LOST)
    with pytest.raises(BrokenPromiseError, match="no rank said that rank 1 had gone"):
        check_the_others(KILL, job, 3)


def test_a_rank_that_ends_as_if_nothing_had_happened_is_found(tmp_path: Path) -> None:
    job = _job(tmp_path / "run")
    job.statuses = (ExitStatus.PEER_LOST, -9, ExitStatus.DONE, ExitStatus.PEER_LOST)
    job.log(0).write_text("rank 1 (stage 0) has gone")
    with pytest.raises(BrokenPromiseError, match="exit statuses"):
        check_the_others(KILL, job, 3)


def test_half_of_the_kills_fall_into_a_save_and_every_rank_gets_some() -> None:
    generator = random.Random(0)
    kills = [draw_kill(number, generator, 0.5) for number in range(20)]
    assert sum(kill.phase == "save" for kill in kills) == 10
    assert {kill.rank for kill in kills} == {0, 1, 2, 3}
    assert {kill.phase for kill in kills} == {"start", "step", "save"}
    assert sum(kill.under_launcher for kill in kills) == 4
