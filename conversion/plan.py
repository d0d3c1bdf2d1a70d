"""What a conversion is going to write: every file, every tensor's offset, and the stored bytes it is made from.

A plan is made from headers alone. It is data: it can be printed, compared with a journal and sent to a worker.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from conversion.carried import SideFiles
from conversion.fp8 import BLOCK
from conversion.regions import StoredMatrix, View
from conversion.safetensors_file import HeaderEntry, build_header

_T = TypeVar("_T")


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


Item = Values | Quantized | Verbatim | SavedChunk | SavedObject


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
        """Identity of what is to be written: names, headers and sizes."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name} {file.nbytes} {len(file.items)} ".encode() + file.header)
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
