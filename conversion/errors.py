"""Kinds of conversion error that a caller tells apart, and what the operating system refuses as one of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ads.errors import ConversionError


class DamagedCheckpointError(ConversionError):
    """A checkpoint's files contradict each other or themselves: truncated, incomplete, stale index, wrong shape."""


@contextmanager
def naming_refusals(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into an error that names the file, or ``path`` where it names none."""
    try:
        yield
    except OSError as error:
        raise ConversionError(
            f"{error.filename or path} cannot be read or written ({error.strerror or error}). "
            "Mend that, or choose another folder."
        ) from error
