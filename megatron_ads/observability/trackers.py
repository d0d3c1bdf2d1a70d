"""Experiment trackers: the metrics of a run also go to Weights & Biases, MLflow or trackio, as ``log.trackers`` asks.

A run has the name of its folder and the resolved recipe as its configuration. Each start of a job is a run of its own:
a resumed one has the same name and begins after the step of its checkpoint. Where a tracker sends what it receives
is for its own environment variables to say (``WANDB_MODE=offline``, ``MLFLOW_TRACKING_URI``, ``TRACKIO_DIR``). A
tracker that fails is reported once and left out from there: it never ends a training run.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_ads.config.training import Tracker
from megatron_ads.errors import ConfigError
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)

PROJECT = "megatron-ads"
_MLFLOW_BATCH = 100
"""Parameters that its interface takes at once."""


class _InitRun:
    """A run of wandb, or of trackio, which has the same interface."""

    def __init__(self, package: Tracker, directory: Path, recipe: Mapping[str, Any]) -> None:
        module: Any = import_module(package)
        folder = {"dir": str(directory)} if package is Tracker.wandb else {}
        self._run = module.init(project=PROJECT, name=directory.resolve().name, config=dict(recipe), **folder)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MlflowRun:
    def __init__(self, directory: Path, recipe: Mapping[str, Any]) -> None:
        mlflow: Any = import_module("mlflow")
        self._client = mlflow.MlflowClient()
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        self._id = self._client.create_run(experiment, run_name=directory.resolve().name).info.run_id
        self._entities: Any = import_module("mlflow.entities")
        params = [self._entities.Param(name, str(value)) for name, value in leaves(recipe) if value != {}]
        for start in range(0, len(params), _MLFLOW_BATCH):
            self._client.log_batch(self._id, params=params[start : start + _MLFLOW_BATCH])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(
            self._id, metrics=[self._entities.Metric(name, value, now, step) for name, value in values.items()]
        )

    def close(self) -> None:
        self._client.set_terminated(self._id)


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of everything in a tree of settings, empty branches too."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


Run = _InitRun | _MlflowRun
_RUNS: dict[Tracker, Callable[[Path, Mapping[str, Any]], Run]] = {
    Tracker.wandb: partial(_InitRun, Tracker.wandb),
    Tracker.trackio: partial(_InitRun, Tracker.trackio),
    Tracker.mlflow: _MlflowRun,
}


def require_installed(names: Sequence[Tracker]) -> None:
    """Refuse trackers that are not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"log.trackers names {name}, but the Python package {name} is not installed. Install it with "
                "pip install 'megatron-ads[track]', or remove it from log.trackers."
            )


class TrackedRuns:
    """A run in every tracker that ``log.trackers`` names."""

    def __init__(self, names: Sequence[Tracker], directory: Path, recipe: Mapping[str, Any]) -> None:
        self._runs: dict[Tracker, Run] = {}
        for name in names:
            with self._without_failing(name):
                self._runs[name] = _RUNS[name](directory, recipe)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of one step to every tracker that has not failed."""
        for name, run in list(self._runs.items()):
            with self._without_failing(name):
                run.log(step, values)

    def close(self) -> None:
        """End every run. Calling it twice is harmless."""
        for name, run in list(self._runs.items()):
            with self._without_failing(name):
                run.close()
        self._runs.clear()

    @contextmanager
    def _without_failing(self, name: Tracker) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  # a process boundary: the client of another program
            self._runs.pop(name, None)
            logger.warning("log.trackers: %s fails and is left out from here on: %r", name, error)
