"""What this process computes on: one CUDA device where there is one, else the CPU with its share of the cores."""

import os
import resource

import torch


def device() -> torch.device:
    """Return the device of this rank; its number on this machine, from torchrun or srun, chooses among several."""
    if torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        shows_only_own = torch.cuda.device_count() == 1  # as srun does with --gpus-per-task
        return torch.device("cuda", 0 if shows_only_own else number)
    return torch.device("cpu")


def backend() -> str:
    """Return the torch.distributed backend that serves ``device()``."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def set_threads(count: int) -> int:
    """Let torch use ``count`` threads in this process, and return how many that is.

    Args:
        count: Threads per process; 0 shares the cores this machine lets us use among its ranks.
    """
    threads = count or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    return threads


def peak_memory_bytes() -> int:
    """Return the most memory held so far: by CUDA tensors where there is a device, else by the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
