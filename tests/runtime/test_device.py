"""Device, backend and threads of one rank; random streams, and what the deterministic mode refuses."""

import os
import random
import subprocess
import sys

import numpy
import pytest
import torch

from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime import device, process_groups
from parity_tests.harness.ranks import run_ranks


@pytest.mark.parametrize(
    ("variable", "number", "visible", "index"),
    [("LOCAL_RANK", "1", 2, 1), ("SLURM_LOCALID", "1", 2, 1), ("LOCAL_RANK", "1", 1, 0)],
    ids=["torchrun", "srun", "each rank is shown only its own"],
)
def test_the_local_rank_chooses_the_device(
    monkeypatch: pytest.MonkeyPatch, variable: str, number: str, visible: int, index: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(variable, number)
    assert (device.device(), device.backend()) == (torch.device("cuda", index), "nccl")


def test_without_a_gpu_it_is_the_cpu_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (device.device(), device.backend()) == (torch.device("cpu"), "gloo")


@pytest.mark.parametrize(("asked", "ranks_here", "threads"), [(3, 2, 3), (0, 2, 4), (0, 16, 1)])
def test_threads_are_as_asked_or_a_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, asked: int, ranks_here: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_here))
    before = torch.get_num_threads()
    try:
        assert (device.set_threads(asked), torch.get_num_threads()) == (threads, threads)
    finally:
        torch.set_num_threads(before)


def test_peak_memory_counts_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    block = torch.ones(1 << 28, dtype=torch.uint8)  # 256 MiB
    assert block.nbytes < device.peak_memory_bytes() < 1 << 40


def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    block = torch.ones(1 << 30, dtype=torch.uint8)
    said = "from megatron_ads.runtime.device import process_memory_bytes; print(process_memory_bytes('VmHWM'))"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, timeout=60, check=True)
    assert 1 << 24 < int(done.stdout) < block.nbytes


# ---- random streams, shared by ranks ----


def _streams(layout: ParallelLayout, seed: int) -> dict[str, float]:
    """Draw one number from each random stream of this rank."""
    process_groups.start(layout)
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    device.seed_everything(seed)
    drawn = {"python": random.random(), "numpy": float(numpy.random.rand()), "torch": torch.rand(()).item()}
    for name in ("model-parallel-rng", "expert-parallel-rng"):
        with get_cuda_rng_tracker().fork(name):
            drawn[name] = torch.rand(()).item()
    drawn["torch again"] = torch.rand(()).item()
    return drawn


def test_streams_differ_by_stage_and_expert_rank_only_where_they_must() -> None:
    # world 4, pp 2, ep 2: ranks 0 1 are stage 0 with ep 0 1, ranks 2 3 are stage 1 with ep 0 1
    ranks = run_ranks(4, _streams, ParallelLayout(world=4, pp=2, ep=2), 5)
    for name in ("python", "numpy", "torch", "torch again", "model-parallel-rng"):
        assert ranks[0][name] == ranks[1][name] != ranks[2][name] == ranks[3][name], name
    assert len({rank["expert-parallel-rng"] for rank in ranks}) == 4


def test_tensor_parallel_ranks_have_their_own_model_parallel_stream() -> None:
    first, second = run_ranks(2, _streams, ParallelLayout(world=2, tp=2), 5)
    assert first["model-parallel-rng"] != second["model-parallel-rng"]
    assert first["torch"] == second["torch"]


def test_the_seed_decides_every_stream() -> None:
    layout = ParallelLayout(world=1)
    first, again, other = (run_ranks(1, _streams, layout, seed)[0] for seed in (5, 5, 6))
    assert first == again
    assert all(first[name] != other[name] for name in first)


def _refused_operation(deterministic: bool) -> bool:
    process_groups.start(ParallelLayout(world=1))
    device.seed_everything(1, deterministic)
    try:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)
    except RuntimeError as error:
        assert "deterministic" in str(error)
        return True
    finally:
        torch.use_deterministic_algorithms(False)
    return False


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_deterministic_mode_refuses_what_may_differ_between_runs(deterministic: bool) -> None:
    assert run_ranks(1, _refused_operation, deterministic) == [deterministic]
