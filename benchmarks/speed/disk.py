"""What ends on a disk, next to its bytes alone: conversions, and checkpoints of a training job."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.conversion import forget_files
from benchmarks.speed.measure import Comparison, Effort, clocked, in_turn

_BLOCK_BYTES = 4 << 20
_TOLERANCE = 0.25
"""A shared disk is not as even as a processor."""


def conversion(effort: Effort) -> Iterator[Comparison]:
    """Convert an FP8 model both ways in this process, next to copies: as many bytes read, and as many written."""
    from benchmarks.conversion import copy_file, model_config, weight_bytes, write_model
    from conversion.convert import to_hf, to_shards
    from conversion.to_hf import ExportDtype
    from megatron_ads.config.model import LayoutConfig

    folder, shards, converted = effort.folder, effort.folder / "shards", effort.folder / "converted"
    config = model_config(0.7) | ({"n_routed_experts": 16, "vocab_size": 8192} if effort.quick else {})
    write_model(folder / "hf", config, files=2)
    layout = LayoutConfig(pp=2, ep=2)
    to_shards(folder / "hf", shards, layout)
    works: dict[str, tuple[Path, Callable[[], object]]] = {
        "to-megatron": (folder / "hf", lambda: to_shards(folder / "hf", converted, layout)),
        "to-hf": (shards, lambda: to_hf(shards, converted, dtype=ExportDtype.FP8, max_shard_bytes=10**9)),
    }
    for direction, (source, work) in works.items():

        def convert(source: Path = source, work: Callable[[], object] = work) -> float:
            shutil.rmtree(converted, ignore_errors=True)
            forget_files(source)
            return clocked(work)()

        def copy(source: Path = source) -> float:
            ratio = weight_bytes(converted) / weight_bytes(source)
            shutil.rmtree(folder / "copied", ignore_errors=True)
            (folder / "copied").mkdir()
            forget_files(source)
            copies = [partial(copy_file, file, target=folder / "copied", ratio=ratio) for file in _weights(source)]
            return clocked(lambda: [each() for each in copies])()

        found = in_turn({"copied": copy, "converted": convert}, seconds=effort.seconds)
        yield Comparison(
            name=f"conversion/{direction}",
            work=f"megatron-ads convert {direction} of {weight_bytes(source) / 1e6:.0f} MB, by one process",
            reference="as many bytes read and written, both flushed",
            work_seconds=found["converted"],
            reference_seconds=found["copied"],
            tolerance=_TOLERANCE,
            figures={"read_bytes": weight_bytes(source)},
        )


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def checkpoint(effort: Effort) -> Iterator[Comparison]:
    """Save and load a checkpoint with its optimizer, next to its bytes written and read."""
    from benchmarks import step_time

    step_time.start_one_rank(threads=1)
    trained = step_time.build_ours(
        step_time.random_model(step_time.CONFIG if effort.quick else step_time.LARGER_CONFIG)
    )
    samples = step_time.random_samples(step_time.BATCHES["mixed"])
    step_time.our_step(trained, [step_time.packed(samples)])()
    folder = effort.folder / "checkpoints"
    save = _saving(trained, folder)
    save()
    files = _contents(_newest(folder))
    works = {
        "save": clocked(save),
        "write": clocked(lambda: _write(files, effort.folder / "raw")),
        "load": _loading(trained, folder),
        "read": lambda: _read(_newest(folder)),
    }
    found = in_turn(works, seconds=2 * effort.seconds)
    size = sum(map(len, files.values()))
    for name, work, reference in (
        ("save", "a checkpoint saved, flushed and with its checksums", "write"),
        ("load", "a checkpoint checked and loaded, from the disk", "read"),
    ):
        yield Comparison(
            name=f"checkpoint/{name}",
            work=f"{work}: {size / 1e6:.0f} MB",
            reference=f"its bytes: {reference}",
            work_seconds=found[name],
            reference_seconds=found[reference],
            tolerance=_TOLERANCE,
            figures={"bytes": size},
        )


def _saving(trained: Any, folder: Path) -> Callable[[], None]:
    from megatron_ads.layout import ParallelLayout
    from megatron_ads.training.checkpoint import JobProgress, save_checkpoint

    step = 0

    def save() -> None:
        nonlocal step
        step += 1
        progress, layout = JobProgress(step=step, updates=trained.optimizer.updates, data={}), ParallelLayout(world=1)
        save_checkpoint(folder, trained.chunks, trained.optimizer, progress, layout, side_files=None, keep_last=1)

    return save


def _loading(trained: Any, folder: Path) -> Callable[[], float]:
    from megatron_ads.layout import ParallelLayout
    from megatron_ads.training.checkpoint import load_checkpoint

    def load() -> float:
        newest = _newest(folder)
        forget_files(newest)
        return clocked(lambda: load_checkpoint(newest, trained.chunks, trained.optimizer, ParallelLayout(world=1)))()

    return load


def _newest(folder: Path) -> Path:
    from megatron_ads.training.checkpoint_folder import complete_checkpoints

    return complete_checkpoints(folder)[-1][1]


def _contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files and flush each."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb", buffering=0) as handle:
            view = memoryview(content)
            while view:
                view = view[handle.write(view[:_BLOCK_BYTES]) :]
            os.fsync(handle.fileno())


def _read(folder: Path) -> float:
    """Read every file from the disk; return the seconds."""
    forget_files(folder)
    buffer, began = bytearray(_BLOCK_BYTES), time.perf_counter()
    for file in (file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - began
