"""What ranks tell of their steps: their own work, which tells a slow one from those that wait for it, and progress."""

import contextlib
import io
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_ads.config.model import Precision
from megatron_ads.config.training import RuntimeConfig
from megatron_ads.layout import ParallelLayout
from megatron_ads.observability.log import start_logging
from megatron_ads.runtime.health.activity import Activity, observed
from megatron_ads.training.run_log import RankTimes, _peak_flops_per_second
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, batches, start
from tests.models.checkpoints import V3, write_checkpoint

STEPS = 4
EACH = 0.3
SLOW_RANK = 2


def _steps(slow_seconds: float) -> tuple[list[dict[str, float]], str]:
    """Work and wait for each other, asynchronously too; rank 2 takes longer. Return the metrics and the log."""
    layout, activity, metrics = ParallelLayout(world=4, pp=2), Activity(), []
    with contextlib.redirect_stderr(io.StringIO()) as log, observed(activity):
        start_logging()
        times = RankTimes(RuntimeConfig(straggler_steps=3), layout, activity)
        for step in range(1, STEPS + 1):
            dist.barrier()  # where the log of the step before would make rank 0 late
            times.restart(measured=True)
            started = time.monotonic()
            work = dist.all_reduce(torch.ones(3), async_op=True)
            time.sleep(EACH + (slow_seconds if dist.get_rank() == SLOW_RANK else 0.0))
            work.wait()
            dist.all_reduce(torch.ones(3))
            metrics.append(times.measure(step, time.monotonic() - started))
    return metrics, log.getvalue()


def test_a_slow_rank_is_named_by_its_own_work() -> None:
    (metrics, said), *others = run_ranks(4, _steps, 3 * EACH)
    for step in metrics:
        assert step["slowest_rank"] == SLOW_RANK
        assert step["slowest_rank_seconds"] >= 4 * EACH
        assert 1.5 < step["slowest_rank_over_median"] < 4.5
        assert step["max_memory_allocated"] > 1e6
    assert said.count("holds up the job") == 1
    assert "rank 2 (stage 1) on " in said
    assert all("slowest_rank" not in step and log == "" for steps, log in others for step in steps)


def test_even_ranks_cause_no_word() -> None:
    for metrics, said in run_ranks(4, _steps, 0.0):
        assert said == ""
        assert len(metrics) == STEPS


def _count_microbatches(recipe: Recipe) -> tuple[int, int]:
    from megatron_ads.training.step import run_step

    model, shards, _ = start(recipe)
    rows, seen = batches(shards.shape.vocab_size, 0, shards.layout), []
    run_step(rows, model.chunks, model.optimizer, learning_rate=1e-3, before_microbatch=lambda: seen.append(1))
    return len(rows), len(seen)


def test_a_step_tells_of_each_of_its_microbatches(tmp_path: Path) -> None:
    recipe = Recipe(folder=write_checkpoint(tmp_path / "v3", V3))
    [(rows, seen)] = run_ranks(1, _count_microbatches, recipe)
    assert rows == seen == 4


GPUS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H20": 148e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": None,
    "NVIDIA H200 NVL": None,
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb": None,
    "NVIDIA GeForce RTX 4090": None,
}


@pytest.mark.parametrize("name", GPUS)
def test_the_peak_of_a_known_gpu_is_found_by_its_name_and_counts_for_bf16_only(name: str) -> None:
    with (
        patch.object(torch.cuda, "is_available", return_value=True),
        patch.object(torch.cuda, "get_device_name", return_value=name),
    ):
        assert _peak_flops_per_second(Precision.bf16) == GPUS[name]
        assert _peak_flops_per_second(Precision.fp32) is None
