"""Write a file front to back past the page cache, in large aligned blocks, where the file system allows it.

Through the page cache every byte is copied by the kernel into memory that it must first find, and written out from
there later; on two cores that takes longer than the disk does.
"""

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 8 << 20
"""A multiple of every disk's block size."""
_BUFFERS = 3
"""One is filled while the others are on their way."""


class DirectWriter:
    """Collects what comes in order into blocks; a thread writes them. Anything else goes through the page cache."""

    def __init__(self, path: Path) -> None:
        """Open an existing file with ``O_DIRECT``, to write it from its start."""
        self._free = deque(mmap.mmap(-1, BLOCK_BYTES) for _ in range(_BUFFERS))  # page-aligned, as O_DIRECT asks
        self._buffer = self._free.popleft()
        self._start = self._filled = 0
        self._under_way: deque[tuple[Future[None], mmap.mmap]] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)  # last, so that nothing after it can fail

    @classmethod
    def open(cls, path: Path) -> "DirectWriter | None":
        """Return a writer of an existing file, or None where the page cache cannot be bypassed."""
        if not hasattr(os, "O_DIRECT"):
            return None
        try:
            return cls(path)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return None
            raise

    def append(self, view: memoryview) -> None:
        """Take bytes in; whole blocks are written."""
        while view:
            count = min(len(view), BLOCK_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == BLOCK_BYTES:
                self._under_way.append((self._thread.submit(self._write, self._buffer, self._start), self._buffer))
                self._start, self._filled = self._start + BLOCK_BYTES, 0
                self._buffer = self._free.popleft() if self._free else self._next_written()

    def _write(self, buffer: mmap.mmap, offset: int) -> None:
        view = memoryview(buffer)
        while view:
            try:
                written = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._leave_direct():
                    raise
            else:
                view, offset = view[written:], offset + written

    def _leave_direct(self) -> bool:
        """Go through the page cache from here on; return whether that is a change.

        Some file systems open a file with ``O_DIRECT`` and then refuse to write it so; all do after a write that
        ended short of a block.
        """
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)

    def _next_written(self) -> mmap.mmap:
        done, buffer = self._under_way.popleft()
        done.result()
        return buffer

    def finish(self) -> tuple[int, bytes]:
        """Wait until every whole block is written, and close; return where the rest belongs, and the rest.

        Raises:
            OSError: If a block could not be written.
        """
        try:
            while self._under_way:
                self._next_written()
        finally:
            self.close()
        return self._start, bytes(self._buffer[: self._filled])

    def close(self) -> None:
        """Drop what is not written."""
        self._thread.shutdown(cancel_futures=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
