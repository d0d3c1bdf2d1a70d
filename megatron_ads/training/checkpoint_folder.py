"""The files of training checkpoints: which are complete, and whether they are whole. No torch, for launchers.

``checkpoint.py`` writes and loads them.
"""

import json
import re
import zlib
from pathlib import Path
from typing import Any

from megatron_ads.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "megatron-ads training checkpoint, version 1"
_COMPLETE = re.compile(r"step-(\d{8})")


def complete_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return ``(step, folder)`` of every complete checkpoint, oldest first."""
    if not directory.is_dir():
        return []
    found = [(_COMPLETE.fullmatch(entry.name), entry) for entry in directory.iterdir() if (entry / MANIFEST).is_file()]
    return sorted((int(match[1]), entry) for match, entry in found if match)


def partial_checkpoints(directory: Path) -> list[Path]:
    """Return the folders that saves left behind when they were cut off."""
    return sorted(directory.glob(".step-*.partial")) if directory.is_dir() else []


def starting_point(directory: Path, *, resume: bool, last_step: int) -> Path | None:
    """Return the newest complete checkpoint, which a job continues from; None if there is none.

    Raises:
        CheckpointError: If ``resume`` is false, or the checkpoint's step is above ``last_step``; if something that is
            no checkpoint has the name of one that the job may save.
    """
    step, folder = max(complete_checkpoints(directory), default=(0, None))
    if folder is not None and not resume:
        raise CheckpointError(
            f"checkpoint.resume is false, but checkpoint.dir holds {folder}. Choose another folder, remove what is "
            "there, or set checkpoint.resume=true to continue from it."
        )
    if folder is not None and (saved := read_manifest(folder)["step"]) > last_step:
        raise CheckpointError(
            f"checkpoint.dir holds {folder}, but train.max_steps is {last_step}: the job would train nothing, and "
            f"export the weights of step {saved}. Choose another checkpoint.dir, or raise train.max_steps."
        )
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = _COMPLETE.fullmatch(entry.name)
        if match and step < int(match[1]) <= last_step:
            raise CheckpointError(
                f"{entry} has no {MANIFEST}, so it is no complete checkpoint, but a save of step {int(match[1])} would "
                "need its name. Restore the file if it was lost, or delete the folder."
            )
    return folder


def verify_sizes(folder: Path) -> None:
    """Check every file's size.

    Raises:
        CheckpointError: Naming the file that is missing or cut off.
    """
    for name, expected in sorted(read_manifest(folder)["files"].items()):
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            found = "missing" if size is None else f"{size} bytes long instead of {expected['bytes']}"
            raise _damaged(folder, f"{name} is {found}")


def verify_files(folder: Path, *, share: tuple[int, int] = (0, 1)) -> None:
    """Check every file's size and, for this rank's ``share`` (index, count) of the files, its checksum.

    Raises:
        CheckpointError: Naming the file that is missing, cut off or changed.
    """
    verify_sizes(folder)
    for index, (name, expected) in enumerate(sorted(read_manifest(folder)["files"].items())):
        if index % share[1] == share[0] and checksum(folder / name) != expected["crc32"]:
            raise _damaged(folder, f"the content of {name} changed since it was written (checksum)")


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {folder} is damaged: {what}. Delete this folder to continue from the checkpoint before it, "
        "or restore the file."
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a complete checkpoint.

    Raises:
        CheckpointError: If there is none, it is cut off, or it is another format's.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: the save was cut off; it cannot be loaded.") from None
    except ValueError as error:
        raise _damaged(folder, f"{MANIFEST} is not JSON ({error})") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST} says that this is a {found!r}; expected {FORMAT!r}.")
    return manifest


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with file.open("rb") as handle:
        while block := handle.read(1 << 24):
            value = zlib.crc32(block, value)
    return value
