"""Errors of damaged checkpoints, and what the operating system or a JSON file refuses as errors of conversion."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ads.errors import ConversionError

LFS_START = b"version https://git-lfs"
"""What a file begins with for which Git left a pointer."""


class DamagedCheckpointError(ConversionError):
    """A checkpoint's files contradict each other or themselves: truncated, incomplete, stale index, wrong shape."""


def copy_again(start: bytes) -> str:
    """Return what to do about a file that begins with ``start`` and cannot be read."""
    return "It is a Git LFS pointer: run git lfs pull." if start.startswith(LFS_START) else "Copy it again."


@contextmanager
def naming_refusals(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into one that names the file, or ``path`` where no file is known."""
    try:
        yield
    except OSError as error:
        raise ConversionError(
            f"{error.filename or path} cannot be read or written ({error.strerror or error}). "
            "Fix that, or choose another folder."
        ) from error


def refuse_pipe(file: Path) -> None:
    """Refuse what is neither a file nor a folder: opening a pipe would wait for someone to write into it.

    Raises:
        DamagedCheckpointError: If it is there, and is a pipe, a socket or a device.
    """
    if file.exists() and not file.is_file() and not file.is_dir():
        raise DamagedCheckpointError(f"{file} is a pipe, a socket or a device. Put a regular file there.")


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a file.

    Raises:
        DamagedCheckpointError: If it is no regular file, or does not hold exactly one object.
    """
    refuse_pipe(file)
    data = file.read_bytes()
    try:
        found = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{file} is not JSON ({error}). {copy_again(data)}") from None
    if not isinstance(found, dict):
        raise DamagedCheckpointError(f"{file} holds a {type(found).__name__}, not a JSON object. Copy it again.")
    return found
