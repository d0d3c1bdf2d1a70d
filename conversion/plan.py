"""What a conversion is going to write, every file, every tensor's offset and the bytes it is made from; what it takes.

A plan is made from headers alone. It is data: it can be printed, compared with a journal and sent to a worker.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from conversion.carried import SideFiles
from conversion.errors import naming_refusals
from conversion.fp8 import BLOCK
from conversion.regions import BAND_ELEMENTS, StoredMatrix, View
from conversion.safetensors_file import HeaderEntry, StoredTensor, build_header
from megatron_ads.disk import existing, free_bytes

_T = TypeVar("_T")
_PROBE_BYTES = 64 << 20
_INTERPRETER_BYTES = 400 << 20
"""What a worker takes with torch and numba loaded and nothing to do, measured with torch 2.13."""
_BYTES_PER_BAND_ELEMENT = 16
"""A band as codes, FP32 product, mask, result and their blocks, all at once."""


@dataclass(frozen=True, slots=True)
class Values:
    """Write a tensor's values, converted to ``dtype``: ``views`` stacked on dim 0."""

    name: str
    offset: int
    dtype: torch.dtype
    views: tuple[View, ...]


@dataclass(frozen=True, slots=True)
class Quantized:
    """Write a weight's FP8 codes, its block scales, or both (None: they are in another file).

    With ``reference``, its codes and scales are kept if its values equal the weight's in BF16.
    """

    name: str
    codes_offset: int | None
    scales_offset: int | None
    view: View
    block: tuple[int, int] = BLOCK
    power_of_two_scales: bool = False
    reference: StoredMatrix | None = None

    @property
    def views(self) -> tuple[View, ...]:
        """The one rectangle it is quantised from."""
        return (self.view,)

    @property
    def offset(self) -> int:
        """Where its first bytes go."""
        return self.codes_offset or self.scales_offset or 0


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Write the bytes of a small tensor that the config determines and no Megatron model holds."""

    name: str
    offset: int
    data: bytes
    views: tuple[View, ...] = ()


@dataclass(frozen=True, slots=True)
class Copied:
    """Write bytes of a file of the source as they are."""

    name: str
    offset: int
    file: Path
    at: int
    """Where they begin there."""
    nbytes: int
    views: tuple[View, ...] = ()


@dataclass(frozen=True, slots=True)
class NewRows:
    """Write rows ``first`` to ``end`` (exclusive) that tokens of a grown vocabulary begin with."""

    name: str
    offset: int
    dtype: torch.dtype
    parameter: str
    """Canonical name, which decides the random numbers."""
    first: int
    end: int
    like: StoredTensor
    old: int
    """Their mean and spread are those of the first ``old`` rows of ``like``."""
    noise: float
    """Times the standard deviation of a column."""
    seed: int
    views: tuple[View, ...] = ()


@dataclass(frozen=True, slots=True)
class SavedChunk:
    """Append a rectangle of a tensor as ``torch.save`` writes it, for torch_dist."""

    name: str
    """Key of the tensor it is a piece of."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: tuple[int, ...]
    """Where in the tensor the piece begins."""
    views: tuple[View, ...]


@dataclass(frozen=True, slots=True)
class SavedObject:
    """Append an empty extra state as ``torch.save`` writes it, for torch_dist."""

    name: str
    views: tuple[View, ...] = ()


Item = Values | Quantized | Verbatim | Copied | NewRows | SavedChunk | SavedObject


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file to write: its header and where everything after it comes from."""

    name: str
    header: bytes
    """Empty for torch_dist, whose items are appended one after the other."""
    nbytes: int
    """Size; for torch_dist the disk to reserve, a little more than is needed."""
    items: tuple[Item, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionPlan:
    """All files of one conversion and the identity of the source they are made from."""

    source: Path
    target: Path
    files: tuple[OutputFile, ...]
    source_files: tuple[Path, ...]
    """Every weight file that is read."""
    source_state: str
    """:func:`folder_state` of them when the plan was made."""
    tensor_count: int
    finishing: tuple[str, ...]
    """Names, relative to the target, that the finishing step writes in addition to ``files``."""
    side_files: tuple[SideFiles, ...]
    """What is carried, of every folder it is carried from."""
    reference: Path | None = None
    """A second checkpoint that is read."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def left_behind(self) -> tuple[str, ...]:
        """Files that seem to belong to the checkpoint and are not carried, each with the reason."""
        names = {name for carried in self.side_files for name in carried.names}
        left = (each for carried in self.side_files for each in carried.left_behind)
        return tuple(dict.fromkeys(each for each in left if each.rpartition(" (")[0] not in names))

    @property
    def source_bytes(self) -> int:
        """Bytes of all files that are read."""
        return sum(file.stat().st_size for file in self.source_files)

    @property
    def digest(self) -> str:
        """Identity of what is to be written: names, headers and sizes, and how new rows are drawn."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name} {file.nbytes} {len(file.items)} ".encode() + file.header)
            drawn = [(item.noise, item.seed, item.first, item.end) for item in file.items if isinstance(item, NewRows)]
            digest.update(repr(drawn).encode() if drawn else b"")
        return digest.hexdigest()


def offsets(entries: Sequence[HeaderEntry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Return (header, file offset of each tensor, file size) for tensors laid out in the given order."""
    header = build_header(entries, metadata)
    position, found = len(header), {}
    for entry in entries:
        found[entry.name] = position
        position += entry.nbytes
    return header, found, position


def in_groups(items: Iterable[_T], bytes_of: Callable[[_T], int], limit: int) -> list[list[_T]]:
    """Put items in order into groups of at most ``limit`` bytes; a larger item has a group to itself."""
    groups: list[list[_T]] = [[]]
    room = limit
    for item in items:
        if groups[-1] and bytes_of(item) > room:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room -= bytes_of(item)
    return groups


def folder_state(files: Sequence[Path]) -> str:
    """Return a digest of file names, sizes and modification times, without reading the files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        status = file.stat() if file.exists() else None
        digest.update(f"{file.name} {status and (status.st_size, status.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


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
    data = os.urandom(1 << 20)
    with naming_refusals(plan.target), tempfile.TemporaryFile(dir=existing(plan.target)) as file:
        start = time.perf_counter()
        for _ in range(_PROBE_BYTES // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        speed = _PROBE_BYTES / (time.perf_counter() - start)
    views = (view for file in plan.files for item in file.items for view in item.views)
    widest = max((view.rectangle.columns for view in views), default=0)
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
