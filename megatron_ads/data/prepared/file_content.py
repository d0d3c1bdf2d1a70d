"""What the files of a source hold: digests by blocks, remembered as long as a file is not touched.

A corpus is found again by its content and not by a path or a date. Reading terabytes at every start would take longer
than the start, so a digest is believed while size, time of change and inode stay the same, as git believes its index.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion.atomic_file import write_small
from megatron_ads.errors import DataError

BLOCK_BYTES = 8 << 20
_TOO_RECENT_SECONDS = 2.0
"""A file may change again within one tick of its clock."""


@dataclass(frozen=True, slots=True)
class FileContent:
    """One file, block by block."""

    sha256: str
    """Of the digests of its blocks."""
    nbytes: int
    newlines: tuple[int, ...]
    """In each block."""


def contents_of(files: Sequence[Path], memory: Path) -> dict[Path, FileContent]:
    """Return what each file holds; ``memory`` is the file that remembers it.

    Raises:
        DataError: If a file cannot be read.
    """
    known = _remembered(memory)
    found: dict[Path, FileContent] = {}
    entries: dict[str, Any] = {}
    for file in dict.fromkeys(files):
        try:
            name, status = str(file.resolve()), file.stat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
            entry = known.get(name)
            if entry is None or entry["stamp"] != stamp:
                content = _read(file)
                entry = {"stamp": stamp, "sha256": content.sha256, "newlines": list(content.newlines)}
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}). Check the path of this source.") from None
        found[file] = FileContent(entry["sha256"], stamp[0], tuple(entry["newlines"]))
        if time.time() - status.st_mtime > _TOO_RECENT_SECONDS:
            entries[name] = entry
    if any(known.get(name) != entry for name, entry in entries.items()):
        write_small(memory, json.dumps(known | entries))
    return found


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _read(file: Path) -> FileContent:
    nbytes = file.stat().st_size
    descriptor = os.open(file, os.O_RDONLY)

    def look(start: int) -> tuple[bytes, int]:
        block = os.pread(descriptor, BLOCK_BYTES, start)
        return hashlib.sha256(block).digest(), int(np.count_nonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")))

    try:
        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
            blocks = list(pool.map(look, range(0, nbytes, BLOCK_BYTES)))
    finally:
        os.close(descriptor)
    together = hashlib.sha256(b"".join(digest for digest, _ in blocks)).hexdigest()
    return FileContent(together, nbytes, tuple(newlines for _, newlines in blocks))
