import errno
import json
import math
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_ads.errors import ConfigError
from megatron_ads.observability.metrics import METRICS, METRICS_FILE, MetricsWriter, read_metrics


def _write(directory: Path, steps: range, *, resume_step: int = 0, loss: float = 1.0) -> None:
    with MetricsWriter(directory, tensorboard=False, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": loss})


def test_each_write_is_one_line_of_standard_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.5, "grad_norm": math.nan, "learning_rate": math.inf})
    line = (tmp_path / METRICS_FILE).read_text()
    assert line == '{"step": 1, "loss": 1.5, "grad_norm": null, "learning_rate": null}\n'


def test_a_written_step_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    writer.close()
    writer.close()


def test_resuming_replaces_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 6), loss=1.0)  # steps 1 to 5; the checkpoint was at 3
    _write(tmp_path, range(4, 7), resume_step=3, loss=0.5)
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 0.5), (5, 0.5), (6, 0.5),
    ]  # fmt: skip


def test_starting_anew_drops_what_an_earlier_run_wrote(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4))
    _write(tmp_path, range(1, 2), loss=9.0)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 9.0}]


def test_a_line_cut_off_by_a_kill_is_left_out_and_written_over(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 3.0}]
    _write(tmp_path, range(2, 3), resume_step=1, loss=2.0)
    assert [row["loss"] for row in read_metrics(tmp_path)] == [3.0, 2.0]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl line 2 .*nonsense"):
        read_metrics(tmp_path)


def test_missing_metrics_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run has written metrics"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("name", ["los", "loss/", "grad_norm/x"])
def test_an_undocumented_name_is_refused(tmp_path: Path, name: str) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer, pytest.raises(ValueError, match="not documented"):
        writer.write(1, {name: 1.0})


def test_a_task_may_have_any_name(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss/my task (v2)/été": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss/my task (v2)/été": 1.0}]


def test_every_documented_name_is_accepted(tmp_path: Path) -> None:
    names = [re.sub(r"\{\w+\}", "query_ad.relevance", name) for name in METRICS]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, dict.fromkeys(names, 1.0))
    assert len(names) == len(set(names)) == len(json.loads((tmp_path / METRICS_FILE).read_text())) - 1


def test_tensorboard_files_hold_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 4.0})
        writer.write(2, {"loss": 3.0})
    with MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.write(2, {"loss": 2.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.0), (2, 2.0)]


def test_a_folder_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"log\.dir .*file"):
        MetricsWriter(tmp_path / "file" / "run", tensorboard=False)


def test_a_full_disk_is_told_once_and_not_by_tensorboards_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer import record_writer

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest's own prints nothing
    writer = MetricsWriter(tmp_path)
    monkeypatch.setattr(record_writer.RecordWriter, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        for step in range(1000):
            writer.write(step, {"loss": 1.0})
            time.sleep(0.01)
    with suppress(OSError):
        writer.close()
    assert "Exception in thread" not in capfd.readouterr().err
