"""Folders that may not be there yet, and the room on their disks. No torch: nodes are checked with it first."""

import shutil
from pathlib import Path


def existing(folder: Path) -> Path:
    """Return the folder, or its nearest ancestor that is there."""
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that ``folder``, or its nearest existing ancestor, is on."""
    return shutil.disk_usage(existing(folder)).free
