"""Folders that may not exist yet, and the free space on their disks. No torch: it runs first on every node."""

import shutil
from pathlib import Path


def existing(folder: Path) -> Path:
    """Return the folder, or its nearest existing ancestor."""
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())


def readable_bytes(count: float) -> str:
    """Return a size in the unit that suits it: ``13.6 MB``, ``2.1 GB``."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that ``folder``, or its nearest existing ancestor, is on."""
    return shutil.disk_usage(existing(folder)).free
