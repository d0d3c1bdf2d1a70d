"""A checkpoint of a large model on one card: seconds, and memory on the card and on the host while it is saved."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.layers import stack_that_fits
from benchmarks.gpu.record import Record
from benchmarks.gpu.stacks import LAYOUT, Built, build, one_rank
from benchmarks.gpu.timing import peak_bytes, wait
from megatron_ads.runtime.device import process_memory_bytes


def checkpoint(record: Record) -> None:
    """Save and load a stack with its optimizer: seconds, memory on the card and on the host while saving."""
    if (stack := stack_that_fits(record, "checkpoint")) is None:
        return
    one_rank()
    built = build(stack)
    built.step()
    with tempfile.TemporaryDirectory(dir=os.environ.get("MEGATRON_ADS_SCRATCH")) as name:
        folder = Path(name)
        parameters = sum(parameter.numel() for model in built.models for parameter in model.parameters())
        wanted, free = 2.2 * 14 * parameters, shutil.disk_usage(folder).free  # twice BF16 weights, three FP32 copies
        if free < wanted:
            record.skip(f"{folder} has {free / 1e9:.0f} GB free, the checkpoint needs {wanted / 1e9:.0f} GB")
            return
        _save(record, built, folder)
        with record.attempt("saving in the background"):
            _save_in_background(record, built, folder)
        _load(record, built, folder)


def _save(record: Record, built: Built, folder: Path) -> None:
    from megatron_ads.training.checkpoint import JobProgress, save_checkpoint
    from megatron_ads.training.checkpoint_folder import checksum

    updates = built.optimizer.updates
    progress = JobProgress(step=1, updates=updates, data={})
    host_before = _restart_host_peak()
    wait()
    begin = time.monotonic()
    on_card = peak_bytes(
        lambda: save_checkpoint(folder, built.chunks, built.optimizer, progress, LAYOUT, side_files=None, keep_last=1)
    )
    seconds = time.monotonic() - begin
    on_host = process_memory_bytes("VmHWM") - host_before
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    begin = time.monotonic()
    for file in files:
        checksum(file)
    checking = time.monotonic() - begin
    card = "" if on_card is None else f", {on_card / 1e9:.2f} GB more on the card"
    said = f"saved {size / 1e9:.2f} GB in {seconds:.1f} s{card}, {on_host / 1e9:.2f} GB more on the host"
    record.figure("save_seconds", seconds, said)
    record.figure("checkpoint_bytes", size)
    record.figure("save_seconds_per_gb", seconds / size * 1e9)
    record.figure("card_peak_bytes", on_card)
    record.figure("host_peak_bytes", on_host)
    record.figure("checksum_seconds", checking, f"the checksums of its files take {checking:.1f} s")


def _save_in_background(record: Record, built: Built, folder: Path) -> None:
    """Time how long a save that a thread writes holds up training."""
    from megatron_ads.training.checkpoint import JobProgress, save_checkpoint

    keep: dict[str, Any] = {"side_files": None, "keep_last": 1, "in_background": True}
    progress = JobProgress(step=2, updates=built.optimizer.updates, data={})
    begin = time.monotonic()
    pending: Any = save_checkpoint(folder, built.chunks, built.optimizer, progress, LAYOUT, **keep)
    held = time.monotonic() - begin
    pending.wait()
    total = time.monotonic() - begin
    record.figure("background_save_seconds", {"held": held, "total": total}, f"in the background: {held:.1f} s held")


def _load(record: Record, built: Built, folder: Path) -> None:
    """Load what was saved over weights that are cleared; the same sums must come back."""
    from megatron_ads.training.checkpoint import load_checkpoint
    from megatron_ads.training.checkpoint_folder import complete_checkpoints

    def sums() -> list[float]:
        return [float(weight.double().sum()) for model in built.models for weight in model.parameters()]

    wanted = sums()
    with torch.no_grad():
        for model in built.models:
            for weight in model.parameters():
                weight.zero_()
    _, newest = complete_checkpoints(folder)[-1]
    begin = time.monotonic()
    load_checkpoint(newest, built.chunks, built.optimizer, LAYOUT)
    wait()
    seconds = time.monotonic() - begin
    record.figure("load_seconds", seconds, f"loaded in {seconds:.1f} s")
    record.check(sums() == wanted, "the weights that were loaded are not those that were saved")


def _restart_host_peak() -> int:
    """Let the kernel count the highest resident memory anew; return what it is now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return process_memory_bytes("VmRSS")
