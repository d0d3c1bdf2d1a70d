"""Errors of damaged checkpoints, and what the operating system or a JSON file refuses as errors of conversion."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ads.errors import ConversionError


class DamagedCheckpointError(ConversionError):
    """A checkpoint's files contradict each other or themselves: truncated, incomplete, stale index, wrong shape."""


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


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a file.

    Raises:
        DamagedCheckpointError: If the file does not hold exactly one object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{file} is not JSON ({error}). Copy it again.") from None
    if not isinstance(found, dict):
        raise DamagedCheckpointError(f"{file} holds a {type(found).__name__}, not a JSON object. Copy it again.")
    return found
