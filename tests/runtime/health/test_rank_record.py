"""Ranks write down how they end, and torchrun does not repeat what cannot succeed."""

from pathlib import Path

import pytest

from megatron_ads.runtime.health.rank_record import (
    FOLDER_VARIABLE,
    ExitStatus,
    exit_status,
    first_failure,
    forget_record,
    last_lines,
    read_records,
    refusal_before_restart,
    write_record,
)

RESTARTS = "TORCHELASTIC_RESTART_COUNT"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.delenv(RESTARTS, raising=False)


def test_nothing_is_written_unless_a_launcher_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_record(0, ExitStatus.CRASHED, "a bug")
    assert list(tmp_path.iterdir()) == []
    assert exit_status(ExitStatus.STOPPED) is ExitStatus.STOPPED


def test_the_first_end_of_a_rank_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "records"))
    write_record(1, ExitStatus.PEER_LOST, "rank 0 has gone")
    write_record(1, ExitStatus.CRASHED, "an error on the way out")
    write_record(0, ExitStatus.CRASHED, "a bug")
    records = read_records(tmp_path / "records")
    assert [(each.rank, each.status, each.message) for each in records] == [
        (1, ExitStatus.PEER_LOST, "rank 0 has gone"),
        (0, ExitStatus.CRASHED, "a bug"),
    ]
    first = first_failure(records)
    assert first is not None and first.rank == 0  # the other one lost a peer
    assert exit_status(ExitStatus.STOPPED) is ExitStatus.STOPPED  # Slurm starts nothing again by itself
    forget_record(1)  # as a rank does that begins again
    write_record(1, ExitStatus.DONE)
    assert {each.rank: each.status for each in read_records(tmp_path / "records")}[1] is ExitStatus.DONE


def test_torchrun_is_told_that_all_is_well_when_another_start_is_of_no_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "node-1"))
    monkeypatch.setenv(RESTARTS, "0")
    assert exit_status(ExitStatus.STOPPED) is ExitStatus.DONE
    assert exit_status(ExitStatus.USER_ERROR) is ExitStatus.DONE
    assert exit_status(ExitStatus.CRASHED) is ExitStatus.CRASHED
    assert exit_status(ExitStatus.PEER_LOST) is ExitStatus.PEER_LOST


def test_ranks_of_every_node_hear_of_a_refusal_before_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RESTARTS, "0")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "node-0"))
    write_record(0, ExitStatus.USER_ERROR, "optim.beta1 is 2")
    assert refusal_before_restart() is None  # this start is the one that finds out
    monkeypatch.setenv(RESTARTS, "1")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "node-1"))
    refusal = refusal_before_restart()
    assert refusal is not None and refusal.message == "optim.beta1 is 2"


def test_a_crash_does_not_stop_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RESTARTS, "0")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "node-0"))
    write_record(0, ExitStatus.CRASHED, "a bug")
    monkeypatch.setenv(RESTARTS, "1")
    assert refusal_before_restart() is None


def test_the_end_of_a_traceback_holds_the_error() -> None:
    try:
        raise ValueError("the reason")
    except ValueError as error:
        assert last_lines(error).endswith("ValueError: the reason")
