"""What the machine has, what its torch offers, and whether a rehearsal leaves its GPU alone."""

import inspect
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.record import Record
from benchmarks.gpu.timing import milliseconds, on_gpu
from megatron_ads.observability.provenance import own_code_digest, provenance
from megatron_ads.runtime.device import device


def facts(record: Record) -> None:
    """Note hardware and versions, look for what the GPU paths need, and measure the two ceilings of the card."""
    record.figure("provenance", provenance())
    record.figure("code_digest", own_code_digest())  # a copy of the code may have come without its revision
    for name, found in _needs().items():
        record.figure(name, bool(found))
        record.check(bool(found), f"{name}: not there")
    record.figure("cuda", torch.version.cuda)
    record.figure("disk_free_bytes", shutil.disk_usage(Path.cwd()).free)
    with record.attempt("Megatron-Core"):
        from megatron_ads.runtime import cpu_compat

        cpu_compat.install()
        from megatron.core import __version__ as version

        record.figure("megatron_core", version)
    if on_gpu():
        _describe_gpu(record)
    with record.attempt("ceilings"):
        _ceilings(record)


def _needs() -> dict[str, object]:
    """Return what the GPU paths rely on, by what it is for."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        varlen: set[str] = set(inspect.signature(varlen_attn).parameters)
    except ImportError:
        varlen = set()
    headers = Path(sysconfig.get_paths()["include"])
    return {
        "packed attention (varlen_attn with scale and window_size, torch >= 2.11)": {"scale", "window_size"} <= varlen,
        "grouped experts (torch.nn.functional.grouped_mm)": hasattr(torch.nn.functional, "grouped_mm"),
        "time limits of groups (ProcessGroup.set_timeout)": hasattr(torch.distributed.ProcessGroup, "set_timeout"),
        "compiled kernels (a C compiler)": shutil.which("cc") or shutil.which("gcc"),
        "compiled kernels (Python.h)": (headers / "Python.h").exists(),
    }


def _describe_gpu(record: Record) -> None:
    properties: Any = torch.cuda.get_device_properties(device())
    record.figure(
        "gpu",
        {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": torch.cuda.get_device_capability(device()),
            "nccl": torch.cuda.nccl.version(),
        },
        f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, torch {torch.__version__}",
    )
    with record.attempt("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit,temperature.gpu", "--format=csv"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=15, check=True).stdout
        record.figure("nvidia_smi", said.splitlines())
    record.figure("cores", len(os.sched_getaffinity(0)))


def _ceilings(record: Record) -> None:
    """Time one large matrix product of random numbers, and one large copy."""
    width = 256 if record.dry_run else 8192
    a, b = (torch.randn(width, width, device=device(), dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * width**3 / milliseconds(lambda: a @ b, repeats=10) * 1e3
    record.figure("matmul_flops_per_second", flops, f"matrix product of {width}^3: {flops / 1e12:.0f} TFLOP/s")
    source = torch.randn(2**16 if record.dry_run else 2**30, device=device())
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / milliseconds(lambda: target.copy_(source), repeats=10) * 1e3
    record.figure("copy_bytes_per_second", rate, f"copy: {rate / 1e9:.0f} GB/s, read and written")


def build_ranks(record: Record) -> None:
    """Build a rank of every stage without weights, as ``plan --build-ranks`` does: nothing may come onto the GPU."""
    from megatron_ads.planning.build_ranks import build_ranks as build
    from megatron_ads.planning.job import load_job

    before = torch.cuda.mem_get_info()[0] if on_gpu() else 0
    built = build(load_job("sft/deepseek_v2_lite_8gpu" if record.dry_run else "sft/deepseek_r1_671b_248gpu"))
    record.figure("seconds", built.seconds, built.lines()[0])
    for fault in built.faults:
        record.check(False, fault)
    record.figure("host_peak_bytes", built.peak_bytes)
    if on_gpu():
        taken, context = torch.cuda.max_memory_allocated(), before - torch.cuda.mem_get_info()[0]
        record.figure("gpu_bytes", taken, f"{taken} bytes of tensors on the GPU")
        record.figure("gpu_bytes_of_the_driver", context)
        record.check(taken == 0, f"building ranks took {taken / 1e9:.2f} GB of the GPU; it should take nothing")
