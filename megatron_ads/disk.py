"""Places that may not exist yet: can they be written, and how much is free. No torch: it runs first on every node."""

import shutil
import tempfile
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


def require_writable(*files: Path | None) -> None:
    """Open every file for writing, and leave none behind: before the work whose result it is to hold.

    Raises:
        OSError: If one cannot be written.
    """
    for file in files:
        if file is not None:
            there = file.exists()
            with file.open("ab"):
                pass
            if not there:
                file.unlink()


def make_writable_folder(folder: Path) -> None:
    """Make a folder, unless it exists, and write a file that vanishes.

    Raises:
        OSError: If that cannot be done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
