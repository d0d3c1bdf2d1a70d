"""Folders that may not exist yet, and the free space on their disks. No torch: it runs first on every node."""

import shutil
from pathlib import Path


def existing(folder: Path) -> Path:
    """Return the folder, or its nearest existing ancestor."""
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that ``folder``, or its nearest existing ancestor, is on."""
    return shutil.disk_usage(existing(folder)).free
