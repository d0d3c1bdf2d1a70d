"""One process prepares a corpus; the others wait for it under a bound, and say for whom."""

import fcntl
from pathlib import Path

import pytest

from megatron_ads.data.prepared import exclusive as module
from megatron_ads.data.prepared.exclusive import exclusive
from megatron_ads.errors import DataError


def test_a_holder_without_progress_is_named_after_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOOKS", 0.01)
    with exclusive(tmp_path, until=lambda: False, timeout_seconds=9):
        message = r"process \d+ on .* prepares .*nothing there has changed for 0 s \(data\.prepare_timeout_seconds\)"
        with pytest.raises(DataError, match=message), exclusive(tmp_path, until=lambda: False, timeout_seconds=0.05):
            pass
    assert "waiting for process" in caplog.text
    with exclusive(tmp_path, until=lambda: False, timeout_seconds=0):  # it is free again
        pass


def test_who_waits_goes_on_when_the_work_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOOKS", 0.0)
    looks, progress = iter([False, False, True]), []
    with (
        exclusive(tmp_path, until=lambda: False, timeout_seconds=9) as first,
        exclusive(
            tmp_path, until=lambda: next(looks), timeout_seconds=9, on_change=lambda: progress.append("")
        ) as second,
    ):
        assert (first, second) == (True, False)
        assert next(looks, None) is None
    assert progress


def test_a_file_system_without_locks_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):  # at once
        with exclusive(tmp_path, until=lambda: False, timeout_seconds=0) as held:
            assert not held  # so that it removes nothing that another one writes
