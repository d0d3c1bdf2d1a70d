"""Read the pickled parts of a torch_dist checkpoint with an unpickler that admits that format's own classes only."""

import collections
import io
import pathlib
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from conversion.errors import DamagedCheckpointError, refuse_pipe
from conversion.safetensors_file import StoredTensor

_METADATA_CLASSES = (
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "_MEM_FORMAT_ENCODING",
)
_IGNORED_CLASSES = {
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
}
"""By module, and never all of a module: what it imports, ``torch.os.system`` for one, can be named through it."""
_DTYPES = tuple(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
_LOCAL_HEADER_BYTES = 30
_ARCHIVE_ERRORS = (
    *(AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
    *(zipfile.BadZipFile, pickle.UnpicklingError),
)
"""What zipfile and pickle raise on damaged bytes."""


class _Ignored:
    """Stands in for the save plans that Megatron-Core leaves in the metadata; reading tensors does not need them."""

    def __init__(self, *_: object) -> None:
        """Take whatever the original takes."""

    def __setstate__(self, state: object) -> None:
        """Drop whatever was stored."""


def read_metadata(file: Path) -> Any:
    """Return the ``torch.distributed.checkpoint.metadata.Metadata`` in ``file``.

    Raises:
        DamagedCheckpointError: If it is not a pickle of that format, or refers to any other class.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    refuse_pipe(file)
    with file.open("rb") as handle:
        try:
            found = _MetadataUnpickler(handle).load()
        except (EOFError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise DamagedCheckpointError(f"{file} is damaged ({error}).") from None
        except pickle.UnpicklingError as error:
            raise DamagedCheckpointError(f"{file} cannot be read safely: {error}.") from None
    if not isinstance(found, Metadata):
        raise DamagedCheckpointError(f"{file} holds a {type(found).__name__}, not the metadata of a checkpoint.")
    if not all(isinstance(getattr(found, name, None), dict) for name in ("state_dict_metadata", "storage_data")):
        raise DamagedCheckpointError(f"{file} is damaged: it does not list what is stored.")
    return found


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        from torch.distributed.checkpoint import filesystem, metadata

        if module == metadata.__name__ and name in _METADATA_CLASSES:
            return getattr(metadata, name)
        if (module, name) == (filesystem.__name__, "_StorageInfo"):
            return filesystem._StorageInfo
        if module == "torch" and (name == "Size" or name in _DTYPES):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module.startswith("pathlib") and name in ("Path", "PosixPath", "PurePosixPath"):
            return pathlib.PurePosixPath
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if name in _IGNORED_CLASSES.get(module, ()):
            return _Ignored
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which does not belong to the format")


@dataclass(frozen=True, slots=True)
class _Saved:
    """What ``torch.save`` wrote about one tensor."""

    storage: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def locate_saved_tensor(file: Path, offset: int, length: int) -> StoredTensor:
    """Find the data of one tensor that ``torch.save`` wrote at ``offset`` of a file, without reading the data.

    Raises:
        DamagedCheckpointError: If there is no such archive, or the tensor is not stored contiguously.
    """
    with file.open("rb") as handle:
        window = _Window(handle, offset, length)
        try:
            archive = zipfile.ZipFile(window)
            entries = {name.partition("/")[2]: name for name in archive.namelist()}
            saved = _TensorUnpickler(archive.open(entries["data.pkl"])).load()
            entry = archive.getinfo(entries[f"data/{saved.storage}"])
            window.seek(entry.header_offset)
            header = window.read(_LOCAL_HEADER_BYTES)
        except _ARCHIVE_ERRORS as error:
            raise DamagedCheckpointError(f"{file} is damaged at byte {offset} ({error}).") from None
    if entry.compress_type != zipfile.ZIP_STORED or saved.stride != _contiguous_stride(saved.shape):
        raise DamagedCheckpointError(f"The tensor at byte {offset} of {file} is compressed or not contiguous.")
    name_bytes, extra_bytes = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    start = offset + entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    return StoredTensor(file, start + saved.offset * saved.dtype.itemsize, saved.dtype, saved.shape)


class _TensorUnpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        _, storage_type, key, _, _ = pid
        return key, storage_type

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return lambda *args: _rebuilt(*args[:6], dtype=args[6])
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which does not belong to a tensor")


def _rebuilt(
    storage: tuple[str, str], offset: int, shape: Any, stride: Any, *_: object, dtype: torch.dtype | None = None
) -> _Saved:
    key, storage_type = storage
    dtype = dtype or _STORAGE_DTYPES[storage_type]
    return _Saved(key, dtype, offset, tuple(shape), tuple(stride))


_STORAGE_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
}


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for extent in reversed(shape):
        stride.append(step)
        step *= max(extent, 1)
    return tuple(reversed(stride))


class _Window(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, handle: IO[bytes], start: int, length: int) -> None:
        self._handle, self._start, self._length, self._position = handle, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._handle.seek(self._start + self._position)
        data = self._handle.read(min(len(buffer), max(self._length - self._position, 0)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
