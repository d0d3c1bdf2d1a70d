"""Where a rung runs and in which number format: on the CPU everywhere, and on a CUDA device where there is one.

    @pytest.mark.parametrize("machine", FP32, ids=str)      # cpu-fp32 always, cuda-fp32 on a machine with a GPU
    def test_...(machine):
        (ours,) = machine.run(1, jobs.forward, machine.job(folder), tokens)
        theirs = reference.forward(folder, tokens, machine)

Both sides run on the machine's device. TF32 is off on it (``conftest``), so FP32 is FP32 there.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.layer_specs import LayerSpec
from megatron_ads.config.model import Precision
from megatron_ads.layout import ParallelLayout
from parity_tests.harness.model_jobs import Job
from parity_tests.harness.ranks import RanksFailed, free_port, run_ranks

_ROOT = Path(__file__).resolve().parent.parent
_LOG_TAIL_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class Machine:
    """A device and the precision that both sides compute in on it."""

    device: str
    """``cpu`` or ``cuda``."""
    precision: Precision

    def __str__(self) -> str:
        return f"{self.device}-{self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return torch.bfloat16 if self.precision is Precision.bf16 else torch.float32

    def job(self, folder: Path, *, layout: ParallelLayout | None = None, **settings: Any) -> Job:
        """Return the job of our side on the checkpoint ``folder``, with grouped experts unless ``spec`` is given."""
        chosen = {"spec": LayerSpec.GROUPED, "precision": self.precision} | settings
        return Job(folder=folder, layout=layout or ParallelLayout(world=1), settings=chosen)

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0, process_group: bool = True
    ) -> list[Any]:
        """Call ``function(*args)`` on ``world`` ranks, as ``run_ranks`` does; tensors come and go on the CPU.

        On CUDA every rank is a fresh process with a device of its own, and the test is skipped where there are fewer:
        NCCL gives no two ranks the same one.
        """
        if self.device == "cpu":
            return run_ranks(world, function, *args, timeout=timeout, process_group=process_group)
        if (devices := torch.cuda.device_count()) < world:
            pytest.skip(f"needs {world} GPUs, here {devices}; the same layout runs over gloo on the CPU")
        return _run_on_gpus(world, (function, args), timeout)


def why_no_gpu() -> str | None:
    """Return why the CUDA cases cannot run here and what to do; None where they can."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; to run this, install a CUDA build of torch"
    return f"torch {torch.__version__} finds no CUDA device; to run this, make nvidia-smi list one"


CPU_FP32, CUDA_FP32 = (Machine(device, Precision.fp32) for device in ("cpu", "cuda"))
CPU_BF16, CUDA_BF16 = (Machine(device, Precision.bf16) for device in ("cpu", "cuda"))
CUDA_MARKS = [pytest.mark.gpu, pytest.mark.skipif(why_no_gpu() is not None, reason=why_no_gpu() or "")]
FP32 = [CPU_FP32, pytest.param(CUDA_FP32, marks=CUDA_MARKS)]
BF16 = [CPU_BF16, pytest.param(CUDA_BF16, marks=CUDA_MARKS)]


def _run_on_gpus(world: int, call: tuple[Callable[..., Any], tuple[Any, ...]], timeout: float) -> list[Any]:
    """Start the ranks and return their answers by rank; whatever happens, none outlives the call."""
    with tempfile.TemporaryDirectory(prefix="gpu-ranks-") as folder:
        files = Path(folder)
        torch.save(call, files / "call")
        port = free_port()
        ranks = [_start(rank, world, port, files) for rank in range(world)]
        try:
            failures = _wait(ranks, files, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if failures:
            raise RanksFailed(world, failures)
        return [torch.load(files / f"answer-{rank}", map_location="cpu", weights_only=False) for rank in range(world)]


def _start(rank: int, world: int, port: int, files: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(_ROOT),
    }  # fmt: skip
    with (files / f"output-{rank}").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "parity_tests.harness.gpu_rank", files / "call", files / f"answer-{rank}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=_ROOT, env=environment,
        )  # fmt: skip


def _wait(ranks: list[subprocess.Popen[bytes]], files: Path, deadline: float) -> dict[int, str]:
    """Return what went wrong, by rank; nothing when all have ended well. The first failure ends the wait."""
    running = dict(enumerate(ranks))
    while running:
        for number, rank in list(running.items()):
            status = rank.poll()
            if status is not None:
                del running[number]
            if status:
                return {number: f"died with exit status {status}\n{_log(number, files)}"}
        if time.monotonic() > deadline:
            return {number: f"did not finish\n{_log(number, files)}" for number in running}
        time.sleep(0.05)
    return {}


def _log(number: int, files: Path) -> str:
    text = (files / f"output-{number}").read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]
    return f"its output ended with\n{text}" if text else ""
