"""What a conversion would take, before it starts: files, bytes, time, memory, disk."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from conversion.errors import naming_refusals
from conversion.plan import ConversionPlan
from conversion.regions import BAND_ELEMENTS
from megatron_ads.disk import existing, free_bytes

_PROBE_BYTES = 64 << 20
_INTERPRETER_BYTES = 400 << 20
"""What a worker takes with torch and numba loaded and nothing to do, measured with torch 2.13."""
_BYTES_PER_BAND_ELEMENT = 16
"""A band as codes, FP32 product, mask, result and their blocks, all at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """The expected cost of a plan."""

    files: int
    tensors: int
    source_bytes: int
    written_bytes: int
    largest_file_bytes: int
    free_bytes: int
    probe_bytes_per_second: float
    seconds: float
    worker_bytes: int
    workers: int

    @property
    def fits(self) -> bool:
        """Whether the target's disk has room."""
        return self.free_bytes >= self.written_bytes

    def __str__(self) -> str:
        """Describe it to a person."""
        return (
            f"read     {self.source_bytes / 1e9:10.2f} GB, {self.tensors:,} parameters\n"
            f"write    {self.written_bytes / 1e9:10.2f} GB in {self.files} files, "
            f"the largest {self.largest_file_bytes / 1e9:.2f} GB\n"
            f"disk     {self.free_bytes / 1e9:10.2f} GB free: {'enough' if self.fits else 'NOT ENOUGH'}\n"
            f"time     {self.seconds / 60:10.1f} min at {self.probe_bytes_per_second / 1e9:.2f} GB/s "
            "(disk probed just now)\n"
            f"memory   {self.worker_bytes * self.workers / 1e9:10.2f} GB for {self.workers} worker(s), "
            "for a model of any size"
        )


def dry_run(plan: ConversionPlan, *, workers: int) -> DryRun:
    """Estimate a plan's cost; writes and deletes a probe file on the target's disk.

    Raises:
        ConversionError: If the probe cannot be written.
    """
    with naming_refusals(plan.target):
        speed = _probe_disk(plan.target)
    widest = max(view.rectangle.columns for file in plan.files for item in file.items for view in item.views)
    return DryRun(
        files=len(plan.files),
        tensors=plan.tensor_count,
        source_bytes=plan.source_bytes,
        written_bytes=plan.nbytes,
        largest_file_bytes=max(file.nbytes for file in plan.files),
        free_bytes=free_bytes(plan.target),
        probe_bytes_per_second=speed,
        seconds=(plan.source_bytes + plan.nbytes) / speed,
        worker_bytes=_INTERPRETER_BYTES + _BYTES_PER_BAND_ELEMENT * max(BAND_ELEMENTS, 128 * widest),
        workers=workers,
    )


def _probe_disk(target: Path) -> float:
    """Return bytes per second of writing and flushing a small file on the disk that ``target`` is or will be on."""
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=existing(target)) as file:
        start = time.perf_counter()
        for _ in range(_PROBE_BYTES // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return _PROBE_BYTES / (time.perf_counter() - start)
