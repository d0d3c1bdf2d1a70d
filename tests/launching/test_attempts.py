"""An attempt is judged by how every rank ended, and repeated as long as the job gets on."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_ads.launching.attempts import (
    checkpoint_step,
    decide,
    describe_failure,
    fruitless_attempts,
    judge,
)
from megatron_ads.runtime.health.rank_record import ExitStatus, RankRecord
from megatron_ads.training.stopping import Outcome

DONE, CRASHED, USER_ERROR = ExitStatus.DONE, ExitStatus.CRASHED, ExitStatus.USER_ERROR
PEER_LOST, STOPPED = ExitStatus.PEER_LOST, ExitStatus.STOPPED


def record(rank: int, status: ExitStatus, message: str = "", ended: float = 0.0) -> RankRecord:
    return RankRecord(rank=rank, host=f"host{rank}", status=status, message=message, ended=ended)


@pytest.mark.parametrize(
    ("statuses", "outcome", "verdict"),
    [
        ([DONE, DONE], Outcome.FINISHED, DONE),
        ([STOPPED, STOPPED], Outcome.STOPPED, STOPPED),
        ([DONE], Outcome.FINISHED, CRASHED),  # the other one was killed during the export
        ([STOPPED, STOPPED], None, CRASHED),  # nobody knows whether the checkpoint is there
        ([PEER_LOST], None, CRASHED),
        ([CRASHED, PEER_LOST], None, CRASHED),
        ([PEER_LOST, USER_ERROR], None, USER_ERROR),
        ([], None, CRASHED),
    ],
)
def test_the_verdict_is_that_of_all_ranks_together(
    statuses: Sequence[ExitStatus], outcome: Outcome | None, verdict: ExitStatus
) -> None:
    records = [record(rank, status) for rank, status in enumerate(statuses)]
    assert judge(records, 2, outcome) is verdict


@pytest.mark.parametrize(
    ("verdict", "fruitless", "again", "status"),
    [
        (DONE, 0, False, DONE),
        (STOPPED, 1, True, STOPPED),
        (USER_ERROR, 1, False, USER_ERROR),
        (CRASHED, 0, True, CRASHED),
        (CRASHED, 3, True, CRASHED),  # the first attempt and two restarts
        (CRASHED, 4, False, CRASHED),  # the third restart too
    ],
)
def test_only_failures_that_do_not_get_on_use_up_the_restarts(
    verdict: ExitStatus, fruitless: int, again: bool, status: ExitStatus
) -> None:
    decision = decide(verdict, fruitless, 3)
    assert (decision.again, decision.status) == (again, status)


def test_attempts_count_that_began_where_the_job_still_stands(tmp_path: Path) -> None:
    for number, step in enumerate([0, 10, 10, 20]):
        (tmp_path / f"attempt-{number}").mkdir()
        (tmp_path / f"attempt-{number}" / "attempt.json").write_text(json.dumps({"step": step}))
    assert [fruitless_attempts(tmp_path, step) for step in (0, 10, 20, 30)] == [1, 2, 1, 0]


def test_a_job_stands_at_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_step(tmp_path / "absent") == 0
    for name in ("step-00000005", "step-00000012", "step-00000020", ".step-00000030.partial"):
        (tmp_path / name).mkdir()
    for name in ("step-00000005", "step-00000012", ".step-00000030.partial"):
        (tmp_path / name / "manifest.json").write_text("{}")
    assert checkpoint_step(tmp_path) == 12


def test_the_first_failure_comes_before_its_victims_even_if_they_ended_earlier() -> None:
    records = [
        record(2, PEER_LOST, "rank 1 (stage 0) failed", ended=1.0),
        record(1, CRASHED, "Traceback\nValueError: a bug", ended=1.2),
        record(0, STOPPED, ended=1.3),
    ]
    lines = describe_failure(records, range(3), Path("/logs"))
    assert lines[:4] == [
        "first failure: rank 1 on host1, CRASHED: ValueError: a bug",
        "    Traceback",
        "    ValueError: a bug",
        "its log: /logs/rank-0001.log",
    ]
    assert lines[4:] == ["lost a peer: rank 2. rank 1 (stage 0) failed"]


def test_a_rank_that_was_killed_is_named_before_those_that_lost_it(tmp_path: Path) -> None:
    (tmp_path / "rank-0001.log").write_text("one\ntwo\n")
    records = [record(0, PEER_LOST, "rank 1 has gone", ended=1.0), record(2, PEER_LOST, "rank 1 has gone", ended=2.0)]
    lines = describe_failure(records, range(3), tmp_path)
    assert lines == [
        "ended without a record (killed, out of memory, or its machine lost): rank 1",
        f"the end of {tmp_path}/rank-0001.log:",
        "    one",
        "    two",
        "lost a peer: ranks 0, 2. rank 1 has gone",
    ]


def test_nothing_is_said_when_nothing_failed() -> None:
    assert describe_failure([record(0, DONE), record(1, STOPPED)], range(2), None) == []
