"""Files that a checkpoint names: a name from a checkpoint never leads out of its folder."""

import os
from pathlib import Path, PurePosixPath

from conversion.errors import LFS_START, DamagedCheckpointError


def inside(folder: Path, name: str, named_in: str) -> Path:
    """Return the path of a file of ``folder`` that ``named_in`` names.

    Raises:
        DamagedCheckpointError: Unless it is a plain relative name, without ``..`` and hidden parts, of a file that is
            not a link out of the folder; links into the cache of the Hugging Face hub are followed.
    """
    path = PurePosixPath(name)
    plain = (
        path.parts
        and str(path) == name
        and not path.is_absolute()
        and not any(part.startswith(".") for part in path.parts)
    )
    if not plain or "\\" in name or not name.isprintable():
        raise DamagedCheckpointError(
            f"{named_in} names the file {name!r}, which is not a plain name inside {folder}: nothing is read or "
            "written there. Get the checkpoint from its publisher again."
        )
    if leads_out(folder, folder / name):
        raise DamagedCheckpointError(
            f"{folder / name} is a link to {os.path.realpath(folder / name)}, outside {folder}. Put the file itself "
            "there; only links into the cache of the Hugging Face hub are followed."
        )
    return folder / name


def leads_out(folder: Path, path: Path) -> bool:
    """Whether links take ``path`` out of ``folder``, elsewhere than into the blobs of a hub cache."""
    root, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    blobs = real.parent
    in_cache = blobs.name == "blobs" and (
        blobs.parent.name.startswith("models--") or root.parent == blobs.parent / "snapshots"
    )
    return root not in real.parents and not in_cache


def is_lfs_pointer(path: Path) -> bool:
    """Whether Git left a pointer where the file itself should be."""
    if path.stat().st_size > 1024:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_START)) == LFS_START
