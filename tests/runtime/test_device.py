"""Device, backend and threads of one rank."""

import os

import pytest
import torch

from megatron_ads.runtime import device


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
