"""Write one large file of known size so that it appears under its name only when it is complete and on disk."""

import ctypes
import errno
import hashlib
import os
import secrets
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from conversion.direct_writer import DirectWriter
from megatron_ads.errors import DiskFullError

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL_SUFFIX = ".partial"
_READ_BACK_BYTES = 1 << 22
_WRITES_IN_FLIGHT = 4
_FLUSH_BYTES = 64 << 20
_DIRECT_FROM_BYTES = 64 << 20
_EARLY_BYTES = 4 << 20
"""Maximum kept in memory, per file, of data that arrives before its turn, such as the scales of FP8 codes."""
_SYNC_FILE_RANGE_WRITE = 2


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A finished file."""

    name: str
    nbytes: int
    sha256: str
    extents: tuple[tuple[int, int], ...] = ()
    """Offset and length of every item, for a format whose items are found through an index elsewhere."""


class PreallocatedFile:
    """A file of ``nbytes`` under a temporary name; ``commit`` hashes it, flushes it and gives it its name.

    A thread hashes and writes while the caller prepares what comes next. What is written front to back is hashed on the
    way and, in a large file, written past the page cache; what is not is read back.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        """Create the temporary file and reserve its disk space."""
        self.path = path
        self.nbytes = nbytes
        # A name of this process's own: a writer that outlives a killed run must not write into its successor's file.
        self._partial = path.with_name(f"{path.name}.{os.getpid():x}-{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._written_since_flush = 0
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self._direct: DirectWriter | None = None
        self._early: dict[int, bytes] = {}
        self._early_bytes = 0
        with naming_full_disk(path):
            self._descriptor = os.open(self._partial, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
            try:
                if nbytes:
                    os.posix_fallocate(self._descriptor, 0, nbytes)
                self._direct = DirectWriter.open(self._partial) if nbytes >= _DIRECT_FROM_BYTES else None
            except OSError:
                self._abandon()
                raise

    def __enter__(self) -> "PreallocatedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor >= 0:
            self._abandon()

    def _abandon(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._direct is not None:
            self._direct.close()
        os.close(self._descriptor)
        self._descriptor = -1
        self._partial.unlink(missing_ok=True)

    def write_at(self, offset: int, data: bytes | memoryview) -> int:
        """Write bytes at ``offset`` and return the offset after them. ``data`` must not change afterwards."""
        self._pending.append(self._thread.submit(self._write, offset, memoryview(data)))
        if len(self._pending) > _WRITES_IN_FLIGHT:
            self._pending.popleft().result()
        return offset + len(data)

    def _write(self, offset: int, view: memoryview) -> None:
        with naming_full_disk(self.path):
            if offset > self._hashed and self._early_bytes + len(view) <= _EARLY_BYTES:
                self._early[offset] = bytes(view)
                self._early_bytes += len(view)
            elif offset == self._hashed:
                self._append(view)
                while self._hashed in self._early:
                    self._append(memoryview(self._early.pop(self._hashed)))
            else:
                self._leave_direct()
                self._write_through_cache(offset, view)

    def _append(self, view: memoryview) -> None:
        self._hash.update(view)
        offset, self._hashed = self._hashed, self._hashed + len(view)
        if self._direct is None:
            self._write_through_cache(offset, view)
        else:
            self._direct.append(view)

    def _leave_direct(self) -> None:
        """Write the incomplete block and the data that arrived early; from here on, write through the page cache."""
        if self._direct is not None:
            rest = self._direct.finish()
            self._direct = None
            self._write_through_cache(rest[0], memoryview(rest[1]))
        for offset, data in self._early.items():
            self._write_through_cache(offset, memoryview(data))
        self._early.clear()

    def _write_through_cache(self, offset: int, view: memoryview) -> None:
        self._written_since_flush += len(view)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written
        if self._written_since_flush >= _FLUSH_BYTES:
            start_writing_out(self._descriptor)
            self._written_since_flush = 0

    def commit(self, *, extents: tuple[tuple[int, int], ...] = ()) -> FileRecord:
        """Flush to disk and rename into place; with ``extents``, the file ends after the last one."""
        while self._pending:
            self._pending.popleft().result()
        self._thread.shutdown()
        with naming_full_disk(self.path):
            self._leave_direct()
            if extents:
                os.ftruncate(self._descriptor, sum(extents[-1]))
        while block := os.pread(self._descriptor, _READ_BACK_BYTES, self._hashed):
            self._hash.update(block)
            self._hashed += len(block)
        with naming_full_disk(self.path):
            os.fsync(self._descriptor)
        self._partial.rename(self.path)
        os.close(self._descriptor)
        self._descriptor = -1
        sync_folder(self.path.parent)
        return FileRecord(self.path.name, self._hashed, self._hash.hexdigest(), extents)


def start_writing_out(descriptor: int) -> None:
    """Have the system begin to write a file's dirty pages to disk, so that a later flush finds little left to do."""
    sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only; Python does not offer it
    if sync_file_range is not None:
        whole_file = ctypes.c_int64(0)
        sync_file_range(ctypes.c_int(descriptor), whole_file, whole_file, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """Return the bytes of a tensor, row-major, without copying if it is contiguous."""
    import torch  # takes seconds, and most files here hold no tensors

    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def write_small(path: Path, content: str | bytes) -> None:
    """Write a small file atomically."""
    data = content.encode() if isinstance(content, str) else content
    with PreallocatedFile(path, len(data)) as file:
        file.write_at(0, data)
        file.commit()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn the operating system's out-of-space error into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"The disk is full at {path.parent} ({error.strerror}) while writing {path.name}. Free some space and run "
            "the same command again, a conversion with --resume; finished files are kept."
        ) from None
