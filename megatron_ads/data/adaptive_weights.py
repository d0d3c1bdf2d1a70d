"""Weights that follow what the model has learned: of single samples, and of whole tasks (AdNanny, section 4.2).

Instance weights. With l_i the summed loss of sample i's K_i target tokens,

    ppl_i = exp(l_i / K_i),    Delta_i = ppl_i before - ppl_i now,    w_i = clip(exp(-beta * Delta_i), w_min, w_max),

so that a sample the model makes progress on weighs less, and one that stagnates or gets worse weighs more. "Before" and
"now" are measurements at two renewals of the weights. A sample's perplexity is that of its training forward passes
since the renewal before (no second pass is made), or of a pass over all samples at the renewal; a sample that has not
been measured twice weighs 1.

Task shares. With M_t in [0, 1] the validation metric of task t,

    d_t = 1 - M_t,    lambda_t = d_t^alpha / sum_u d_u^alpha.

Ours: M_t is the mean over the task's held-out rows of 1 / ppl_i, which every layout can measure while it trains.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ads.errors import DataError
from megatron_ads.metrics.text import perplexities

Vector = NDArray[np.float64]

QUANTILES = (10, 50, 90)
"""Percentiles of the instance weights that are logged."""


def instance_weights(before: Vector, now: Vector, *, beta: float, lowest: float, highest: float) -> Vector:
    """Return w for perplexities before and now: (N,), (N,) -> (N,)."""
    # The exponent is clipped instead of its exponential, which could overflow.
    exponent = np.clip(-beta * (before - now), math.log(lowest), math.log(highest))
    return np.clip(np.exp(exponent), lowest, highest)


def task_shares(metrics: Mapping[str, float], *, alpha: float) -> dict[str, float]:
    """Return lambda for each task's metric; equal shares if every task is learned."""
    distances = {task: (1.0 - metric) ** alpha for task, metric in metrics.items()}
    total = sum(distances.values())
    if total == 0:
        return dict.fromkeys(metrics, 1.0 / len(metrics))
    return {task: distance / total for task, distance in distances.items()}


class InstanceWeights:
    """The weight of every training sample, the same on every rank, due to be renewed every ``interval`` steps.

    Every rank keeps four doubles a sample, 32 MB for a million, and no rank ever sends more than a step's losses.
    """

    def __init__(self, tasks: Sequence[str], *, interval: int, beta: float, lowest: float, highest: float) -> None:
        """Start with weight 1 for every sample, given their tasks."""
        samples = len(tasks)
        self._interval, self._beta, self._lowest, self._highest = interval, beta, lowest, highest
        self._steps = 0
        self._weights = np.ones(samples)
        self._before = np.full(samples, np.nan)
        self._loss_sums = np.zeros(samples)
        self._targets = np.zeros(samples)
        names, of_samples = np.unique(tasks, return_inverse=True)
        self._of_task = {name: np.flatnonzero(of_samples == index) for index, name in enumerate(names.tolist())}

    def of(self, samples: Sequence[int]) -> Vector:
        """Return the weights of these samples."""
        weights: Vector = self._weights[np.asarray(samples, dtype=np.int64)]
        return weights

    def observe(self, samples: Sequence[int], loss_sums: Sequence[float], targets: Sequence[int]) -> None:
        """Take in what one step measured of its samples."""
        numbers = np.asarray(samples, dtype=np.int64)
        np.add.at(self._loss_sums, numbers, np.asarray(loss_sums, dtype=np.float64))
        np.add.at(self._targets, numbers, np.asarray(targets, dtype=np.float64))
        self._steps += 1

    @property
    def due(self) -> bool:
        """Whether an interval ends here; before the first step one does, with nothing measured."""
        return self._steps % self._interval == 0

    def measure_all(self, loss_sums: Sequence[float], targets: Sequence[int]) -> None:
        """Take in a measurement of every sample, in place of those of the steps since the last renewal."""
        self._loss_sums[:] = loss_sums
        self._targets[:] = targets

    def renew(self) -> None:
        """Make the weights of the samples measured since the last renewal, and forget the measurements."""
        measured = self._targets > 0
        now = perplexities(self._loss_sums, self._targets)
        both = measured & ~np.isnan(self._before)
        self._weights[both] = instance_weights(
            self._before[both], now[both], beta=self._beta, lowest=self._lowest, highest=self._highest
        )
        self._before[measured] = now[measured]
        self._loss_sums[:] = 0
        self._targets[:] = 0

    def quantiles(self) -> dict[str, float]:
        """Return how far the weights are apart within each task, by metric name."""
        return {
            f"instance_weight_p{percent}/{task}": value
            for task, numbers in self._of_task.items()
            for percent, value in zip(QUANTILES, np.percentile(self._weights[numbers], QUANTILES).tolist(), strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides future weights."""
        arrays = {name: torch.from_numpy(array.copy()) for name, array in self._arrays().items()}
        return {"steps": self._steps, **arrays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            DataError: If it belongs to another number of samples.
        """
        for name, array in self._arrays().items():
            if len(state[name]) != len(array):
                raise DataError(
                    f"The checkpoint holds weights of {len(state[name])} samples, this job has {len(array)}. Use the "
                    "same data settings, or start anew with another checkpoint.dir."
                )
            array[:] = state[name].numpy()
        self._steps = state["steps"]

    def _arrays(self) -> dict[str, Vector]:
        return {name: getattr(self, f"_{name}") for name in ("weights", "before", "loss_sums", "targets")}
