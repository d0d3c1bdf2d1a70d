"""Time, memory, errors and waits of a piece of GPU work; on a CPU, in a dry run, what can be had there."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_ads.runtime.device import device

LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-3}
"""Relative error against FP32: BF16 operands stay below 1e-2; a fused FP32 kernel may use TF32, with 3e-4."""
Work = Callable[[], object]


def on_gpu() -> bool:
    return torch.cuda.is_available()


def wait() -> None:
    """Wait until the device has done all that it was given."""
    if on_gpu():
        torch.cuda.synchronize()


def milliseconds(work: Work, *, repeats: int = 5, warm_up: int = 2) -> float:
    """Return the median time of ``work``, waiting for the device before and after; warm-up runs are not counted."""
    times = []
    for number in range(warm_up + repeats):
        wait()
        begin = time.perf_counter()
        work()
        wait()
        if number >= warm_up:
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def peak_bytes(work: Work) -> int | None:
    """Return the most memory that tensors took during ``work`` beyond what there was before; None on a CPU."""
    if not on_gpu():
        work()
        return None
    wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    wait()
    return torch.cuda.max_memory_allocated() - before


def host_waits(work: Work) -> int | None:
    """Return how often the host waited for the device during ``work``, as torch counts it; None on a CPU."""
    if not on_gpu():
        work()
        return None
    wait()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return ||found - wanted|| / ||wanted|| in FP64; NaN where a value is no number."""
    difference = torch.linalg.vector_norm(found.detach().double() - wanted.detach().double())
    return float(difference / torch.linalg.vector_norm(wanted.detach().double()))


def fill_free_memory_with_nan(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
    """Leave NaN in memory that the allocator will hand out again: whatever is read before it is written shows."""
    blocks = [torch.full(shape, torch.nan, dtype=dtype, device=device()) for shape in shapes]
    del blocks


def forget() -> None:
    """Give memory that no tensor uses back."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def kernel_table(work: Work, *, rows: int = 30) -> list[tuple[str, float, int]]:
    """Return name, total ms and calls of the kernels that took longest during ``work``."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if on_gpu() else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        work()
        wait()
    name = "self_device_time_total" if on_gpu() else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, name))
    return [(event.key[:100], round(getattr(event, name) / 1e3, 3), event.count) for event in events[:rows]]
