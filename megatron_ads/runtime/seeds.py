"""One seed for everything random in a job, and a mode in which equal runs give equal bits."""

import os
import random

import numpy
import torch

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
        _require_determinism()
    stage_seed = seed + _STAGE_STRIDE * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    numpy.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def _require_determinism() -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # NVIDIA cuBLAS, "Results reproducibility"
    os.environ.setdefault("NCCL_ALGO", "Ring")  # the order of summation must not depend on what NCCL measured
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # Transformer Engine's attention backward
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow, and never read
    torch.backends.cudnn.benchmark = False
