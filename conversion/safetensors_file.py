"""The safetensors container: headers read and written without touching tensor data, data read through mmap.

Layout: 8 bytes little-endian header length, the header as JSON, then the data. A tensor's ``data_offsets`` count from
the end of the header. Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.atomic_file import FileRecord, PreallocatedFile, tensor_bytes
from conversion.errors import LFS_START, DamagedCheckpointError, copy_again, refuse_pipe

DTYPES: dict[str, torch.dtype] = {
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_READ_AHEAD_BYTES = 8 << 20
"""Requested from the system after every mapped range, because the next range usually follows there."""
_LARGEST = 1 << 63
"""No offset or extent is so large, but a JSON number may be."""
_MOST_DIMENSIONS = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one contiguous tensor lies in a file; any container format reduces to these."""

    file: Path
    offset: int
    """Of the first data byte, from the start of the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Length of dim 0; a vector is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape) // max(self.rows, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read_rows(self, first: int, last: int) -> torch.Tensor:
        """Map rows ``first`` to ``last`` (exclusive) as a ``(rows, columns)`` tensor; treat it as read-only."""
        row_bytes = self.columns * self.dtype.itemsize
        flat = map_bytes(self.file, self.offset + first * row_bytes, (last - first) * row_bytes)
        return flat.view(self.dtype).view(last - first, self.columns)

    def read(self) -> torch.Tensor:
        """Map the whole tensor; treat it as read-only."""
        return self.read_rows(0, self.rows).view(self.shape)


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What a safetensors file says it holds."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    data_start: int
    """File offset of the first data byte."""


def map_bytes(file: Path, offset: int, length: int) -> torch.Tensor:
    """Map a range of a file as a flat uint8 tensor. The mapping is private and goes with the tensor."""
    if length == 0:
        return torch.empty(0, dtype=torch.uint8)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with file.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), offset, length + _READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        # Copy-on-write rather than read-only: torch warns about buffers it could not write to.
        mapped = mmap.mmap(handle.fileno(), offset - start + length, access=mmap.ACCESS_COPY, offset=start)
    return torch.frombuffer(mapped, dtype=torch.uint8, offset=offset - start)


def read_header(file: Path) -> SafetensorsHeader:
    """Read and check one file's header.

    Raises:
        DamagedCheckpointError: If the file is missing, truncated, not safetensors, or its tensors leave gaps, overlap
            or disagree with their shapes.
    """
    size, header, data_start = _read_json_header(file)
    metadata = header.pop("__metadata__", {})
    tensors, ranges = {}, []
    for name, entry in header.items():
        tensors[name], end = _stored(file, name, entry, data_start)
        ranges.append((tensors[name].offset - data_start, end, name))
    position, data_bytes = 0, size - data_start
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise DamagedCheckpointError(
                f"{name} in {file} starts at data byte {begin}, but the tensor before it ends at {position}."
            )
        position = end
    if position != data_bytes:
        raise DamagedCheckpointError(
            f"{file} holds {data_bytes} bytes of data, but its header describes {position}: "
            f"{'truncated' if data_bytes < position else 'bytes left over'}. Copy the file again."
        )
    return SafetensorsHeader(tensors=tensors, metadata=metadata, data_start=data_start)


def _read_json_header(file: Path) -> tuple[int, dict[str, Any], int]:
    refuse_pipe(file)
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            start = handle.read(len(LFS_START))
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise DamagedCheckpointError(
                    f"{file} is truncated or not safetensors ({size} bytes). {copy_again(start)}"
                )
            handle.seek(8)
            header = json.loads(handle.read(length))
        if not isinstance(header, dict):
            raise DamagedCheckpointError(f"The header of {file} is not a JSON object. Copy the file again.")
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{file} is missing. Copy it again from where the checkpoint came from.") from None
    except DamagedCheckpointError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"The header of {file} is not JSON ({error}). Copy the file again.") from None
    return size, header, 8 + length


def _stored(file: Path, name: str, entry: Mapping[str, Any], data_start: int) -> tuple[StoredTensor, int]:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if len(shape) > _MOST_DIMENSIONS:
            raise ValueError(shape)
    except (KeyError, TypeError, ValueError):
        code, shape, begin, end = None, (), None, None
    if not isinstance(code, str) or not all(
        type(number) is int and 0 <= number < _LARGEST for number in (begin, end, *shape)
    ):
        raise DamagedCheckpointError(
            f"The header of {file} describes {name} without a dtype, a shape and data_offsets. Copy the file again."
        )
    if code not in DTYPES:
        raise DamagedCheckpointError(
            f"{name} in {file} is {code}; the dtypes that can be converted are {', '.join(DTYPES)}."
        )
    stored = StoredTensor(file, data_start + begin, DTYPES[code], shape)
    if end - begin != stored.nbytes:
        raise DamagedCheckpointError(
            f"{name} in {file} takes {end - begin} bytes, but {code} of shape {stored.shape} is "
            f"{stored.nbytes}. Copy the file again."
        )
    return stored, end


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """Name, dtype and shape of a tensor about to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def header_order(entries: Sequence[HeaderEntry]) -> tuple[HeaderEntry, ...]:
    """Return the entries in the order safetensors itself writes: wide dtypes first (alignment), then by name."""
    rank = {"I64": 0, "F64": 1, "F32": 2, "I32": 3, "BF16": 4, "F16": 5, "F8_E4M3": 6, "U8": 7}
    return tuple(sorted(entries, key=lambda entry: (rank[CODES[entry.dtype]], entry.name)))


def build_header(entries: Sequence[HeaderEntry], metadata: Mapping[str, str]) -> bytes:
    """Return the length-prefixed header for tensors laid out back to back in the given order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the reference implementation aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Write a file of these tensors, which are on the host; it appears when it is complete.

    Raises:
        DiskFullError: If they do not fit.
    """
    entries = header_order([HeaderEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()])
    header = build_header(entries, {"format": "pt"})
    with PreallocatedFile(path, len(header) + sum(entry.nbytes for entry in entries)) as file:
        end = file.write_at(0, header)
        for entry in entries:
            end = file.write_at(end, tensor_bytes(tensors[entry.name]))
        return file.commit()
