"""Every metrics line also goes to the trackers, offline here; what fails in one of them does not end the run."""

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.config.training import Tracker
from megatron_ads.errors import ConfigError
from megatron_ads.observability import trackers
from megatron_ads.observability.metrics import MetricsWriter, read_metrics
from megatron_ads.observability.trackers import PROJECT, TrackedRuns, require_installed

RECIPE = {"recipe": {"train": {"steps": 2, "seed": 7}}, "ranks": 1}


def _needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        find_spec(package) is None, reason=f"{package} is not installed: pip install 'megatron-ads[track]'"
    )


@pytest.fixture(autouse=True)
def _logging_to_caplog(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.getLogger("megatron_ads"), "propagate", True)
    yield


def _write(folder: Path, tracker: Tracker) -> None:
    tracked = TrackedRuns([tracker], folder, RECIPE)
    with MetricsWriter(folder, tensorboard=False, tracked=tracked) as writer:
        writer.write(1, {"loss": 2.5})
        writer.write(2, {"loss": 1.25, "grad_norm": 0.5})


@_needs("mlflow")
def test_mlflow_receives_name_recipe_and_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = tmp_path / "my-run"
    folder.mkdir()
    _write(folder, Tracker.mlflow)
    assert "left out" not in caplog.text
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(PROJECT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("my-run", "FINISHED")
    assert run.data.params["recipe.train.seed"] == "7"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 2.5), (2, 1.25)]


@_needs("wandb")
def test_wandb_writes_a_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "my-run"
    folder.mkdir()
    _write(folder, Tracker.wandb)
    assert "left out" not in caplog.text
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    expected, deadline = (b"my-run", b"grad_norm", b"1.25", b"seed"), time.monotonic() + 30
    while not all(text in file.read_bytes() for text in expected):  # its own process writes, a little later
        assert time.monotonic() < deadline, file.read_bytes()
        time.sleep(0.2)


@_needs("trackio")
def test_trackio_writes_a_run_to_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported, here for the first time
    folder = tmp_path / "my-run"
    folder.mkdir()
    _write(folder, Tracker.trackio)
    assert "left out" not in caplog.text
    (database,) = (tmp_path / "trackio").rglob(f"*{PROJECT}*.db")
    with sqlite3.connect(database) as connection:
        rows = list(connection.execute("select run_name, step, metrics from metrics order by step"))
    assert [(name, step, json.loads(values)["loss"]) for name, step, values in rows] == [
        ("my-run", 1, 2.5),
        ("my-run", 2, 1.25),
    ]


class _Failing:
    """Takes one step, and raises at the next."""

    def __init__(self, directory: Path, recipe: Mapping[str, Any]) -> None:
        self.steps: list[int] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)
        if step > 1:
            raise ConnectionError("the service is gone")

    def close(self) -> None:
        raise AssertionError("a tracker that failed is left alone")


def _refuse(directory: Path, recipe: Mapping[str, Any]) -> trackers.Run:
    raise PermissionError("no key")


@pytest.mark.parametrize(("make", "reason"), [(_Failing, "the service is gone"), (_refuse, "no key")])
def test_a_tracker_that_fails_is_reported_once_and_does_not_stop_the_run(
    make: Callable[..., trackers.Run],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(trackers._RUNS, Tracker.mlflow, make)
    with MetricsWriter(tmp_path, tensorboard=False, tracked=TrackedRuns([Tracker.mlflow], tmp_path, {})) as writer:
        for step in range(1, 5):
            writer.write(step, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    (record,) = caplog.records
    assert "mlflow" in record.message and reason in record.message


def test_a_tracker_that_is_not_installed_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    require_installed([])
    with pytest.raises(ConfigError, match=r"log\.trackers names trackio, .*pip install 'megatron-ads\[track\]'"):
        require_installed([Tracker.trackio])
