"""What each rank spent on its own work in a logged step, and which rank lags behind."""

import socket
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_ads.config.training import RuntimeConfig
from megatron_ads.layout import ParallelLayout
from megatron_ads.observability.stragglers import StragglerWatch
from megatron_ads.runtime.device import device, peak_memory_bytes
from megatron_ads.runtime.health.activity import Activity


class RankTimes:
    """A clock on every rank; rank 0 compares them."""

    def __init__(self, config: RuntimeConfig, layout: ParallelLayout, activity: Activity) -> None:
        """Tell rank 0 where the ranks run; a collective."""
        hosts = [""] * layout.world
        dist.all_gather_object(hosts, socket.gethostname())
        stages = [layout.coordinates(rank).pp for rank in range(layout.world)]
        self._stragglers = StragglerWatch(stages, hosts, factor=config.straggler_factor, steps=config.straggler_steps)
        self._activity = activity
        self._started = time.monotonic()

    def restart(self, *, measured: bool) -> None:
        """Begin the next step here; ``measured`` says whether ``measure`` will be called at its end."""
        self._started = time.monotonic()
        self._activity.stalls.restart(measured=measured)

    def measure(self, step: int, step_seconds: float) -> dict[str, float]:
        """Return the metrics that compare the ranks; one collective."""
        own_seconds = time.monotonic() - self._started - self._activity.stalls.seconds()
        memory, seconds = _of_all_ranks(peak_memory_bytes(), own_seconds)
        metrics = {"memory_bytes": max(memory)}
        slowest = self._stragglers.observe(step, seconds, step_seconds) if dist.get_rank() == 0 else None
        if slowest is not None:
            metrics |= {
                "slowest_rank": slowest.rank,
                "slowest_rank_seconds": slowest.seconds,
                "slowest_rank_over_median": slowest.over_median,
            }
        return metrics


def _of_all_ranks(*values: float) -> Sequence[Sequence[float]]:
    """Return, for each value, that of every rank."""
    table = torch.zeros(len(values), dist.get_world_size(), dtype=torch.float64, device=device())
    table[:, dist.get_rank()] = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(table)
    rows: list[list[float]] = table.tolist()
    return rows
