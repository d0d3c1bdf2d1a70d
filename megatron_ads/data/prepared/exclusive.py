"""One process at a time prepares a corpus; the others wait for it, as long as it makes progress.

The system's lock ends with the process that holds it. On a file system without locks two processes may prepare the same
corpus at once: they write the same portions under names of their own, so that the result is the same.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ads.errors import DataError, DiskFullError, one_line
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)

_LOCK = "prepare.lock"
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_LINES = 60.0


@contextmanager
def refused_writes_named(directory: Path) -> Iterator[None]:
    """Turn the system's refusal to write prepared rows into an error that says what to do.

    Raises:
        DataError: For a full disk, a quota, missing permissions and the like.
    """
    try:
        yield
    except (OSError, DiskFullError) as error:  # DiskFullError: of small files, in the words of a conversion
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise DataError(
            f"rows cannot be prepared in {directory}: {reason}. Make room there, or choose another "
            "data.prepared_dir (without one they are in log.dir), and start again; finished portions are kept."
        ) from None


@contextmanager
def exclusive(
    folder: Path,
    *,
    until: Callable[[], bool],
    timeout_seconds: float,
    on_change: Callable[[], None] = lambda: None,
) -> Iterator[bool]:
    """Hold the right to prepare ``folder``, or wait until another process has done so; yield whether it is held.

    ``on_change`` is called while waiting, whenever the other process has made progress.

    Raises:
        DataError: If the other process holds it and nothing in the folder changes for ``timeout_seconds``.
    """
    with (folder / _LOCK).open("a+", encoding="utf-8") as file:
        held = _wait(file.fileno(), folder, until, timeout_seconds, on_change)
        if held:
            file.truncate(0)
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
            file.flush()
        yield held


def _wait(
    descriptor: int, folder: Path, until: Callable[[], bool], timeout_seconds: float, on_change: Callable[[], None]
) -> bool:
    """Return whether the lock is held; not, if the work is done or there are no locks here."""
    state, changed, told = -1.0, time.monotonic(), -_SECONDS_BETWEEN_LINES
    while not until():
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError:
            return False
        now = time.monotonic()
        if (latest := folder.stat().st_mtime) != state:  # changes with every file in it
            state, changed = latest, now
            on_change()
        if now - told >= _SECONDS_BETWEEN_LINES:
            logger.warning("waiting for %s, which prepares %s", _holder(folder), folder)
            told = now
        if now - changed > timeout_seconds:
            raise DataError(
                f"{_holder(folder)} prepares {folder}, and nothing there has changed for {timeout_seconds:.0f} s "
                "(data.prepare_timeout_seconds). Look whether it hangs; end it to have this job prepare the rest."
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return False


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / _LOCK).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
