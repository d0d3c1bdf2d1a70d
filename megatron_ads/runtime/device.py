"""What this process computes on, with one seed for everything random and a mode in which equal runs give equal bits.

One CUDA device where there is one, else the CPU with its share of the cores.
"""

import os
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy
import torch


def device() -> torch.device:
    """Return the device of this rank; its number on this machine, from torchrun or srun, chooses among several."""
    if torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        shows_only_own = torch.cuda.device_count() == 1  # as srun does with --gpus-per-task
        return torch.device("cuda", 0 if shows_only_own else number)
    return torch.device("cpu")


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on ``device()``; from page-locked memory, it is copied while kernels run."""
    return tensor.to(device(), non_blocking=True)


def use_own_device() -> None:
    """Make ``device()`` that of this thread, which begins on the first GPU: even pinning memory takes room there."""
    if device().type == "cuda":
        torch.cuda.set_device(device())


def backend() -> str:
    """Return the torch.distributed backend that serves ``device()``."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def transformer_engine_fault() -> str | None:
    """Return why Transformer Engine cannot serve this process, or None. Its package alone is not enough."""
    if find_spec("transformer_engine") is None:
        return "it is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU here"
    try:
        import transformer_engine.pytorch  # noqa: F401 - compiled for one version of torch
    except (ImportError, OSError, RuntimeError) as error:
        return f"its part for torch cannot be imported: {error}"
    return None


def set_threads(count: int) -> int:
    """Let torch use ``count`` threads (0: this rank's share of the machine's cores); return how many that is."""
    threads = count or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    return threads


def peak_memory_bytes() -> int:
    """Return the most memory held so far: by CUDA tensors where there is a device, else by the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return process_memory_bytes("VmHWM")


def process_memory_bytes(field: Literal["VmHWM", "VmRSS"]) -> int:
    """Return the most memory that this process had in RAM since it began (``VmHWM``), or what it has now (Linux).

    ``ru_maxrss`` would take over that of the process which started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def free_memory_bytes() -> int:
    """Return the memory that can still be had: of the CUDA device where there is one, else of this machine (Linux)."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


_STAGE_STRIDE = 100_003
"""Distance of the seeds of neighbouring pipeline stages.

Megatron-LM has 100 there, and megatron-core 0.16.1 adds 100 per expert rank, so that stage 0 with expert rank 1 and
stage 1 with expert rank 0 would share a stream.
"""


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy, torch and Megatron's RNG tracker, by pipeline stage, and by tensor and expert rank there.

    Ranks that differ only in data-parallel position get the same streams. Process groups must have been started.

    Args:
        deterministic: Refuse algorithms that may give other bits on another run; on CUDA that costs speed, and
            must come before the first kernel, because cuBLAS reads its setting once.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # NVIDIA cuBLAS, "Results reproducibility"
        os.environ.setdefault("NCCL_ALGO", "Ring")  # the order of summation must not depend on what NCCL measured
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # Transformer Engine's attention backward
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow, and never read
        torch.backends.cudnn.benchmark = False
    stage_seed = seed + _STAGE_STRIDE * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    numpy.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
