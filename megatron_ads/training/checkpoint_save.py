"""Brings a planned checkpoint to the disk: every rank its file, then rank 0 the manifest and the folder's name.

The ranks tell each other through the job's store, not by collectives, so that a thread may do it while training
continues. A folder has its name only when everything in it is on disk; a process that is killed before leaves a
``.partial`` one, which the next save removes.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from conversion.atomic_file import sync_folder
from megatron_ads.errors import CheckpointError, MegatronAdsError
from megatron_ads.observability.log import get_logger
from megatron_ads.runtime.process_groups import job_store
from megatron_ads.training.checkpoint_errors import failed_writes_named
from megatron_ads.training.checkpoint_folder import MANIFEST, checksum, partial_checkpoints
from megatron_ads.training.checkpoint_writer import WrittenFile

logger = get_logger(__name__)

SLOWEST_WRITER_SECONDS = 3600.0
"""For how long a rank that has written its file waits for the others: storage may be slow, and unevenly."""
_ABANDONED_SECONDS = 30.0
"""For how long the end of a job waits for the piece that is being written."""
_END = "end"


class PendingSave:
    """A checkpoint on its way to the disk; the same calls on every rank.

    ``write`` writes this rank's file, unless what it is given says that the save is abandoned; ``complete`` is called
    on rank 0 with all files once they are written. ``directory`` is named in errors.
    """

    def __init__(
        self,
        write: Callable[[Callable[[], bool]], WrittenFile],
        complete: Callable[[list[WrittenFile]], None],
        directory: Path,
    ) -> None:
        self._write, self._complete, self._directory = write, complete, directory
        self._store = job_store("checkpoint")
        self._error: Exception | None = None
        self._abandoned = threading.Event()
        # A daemon: storage that has stalled must not keep a process that has failed from ending.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)

    def start(self, *, in_background: bool) -> None:
        """Write in a thread, or at once; then it raises as ``wait`` does."""
        if in_background:
            self._thread.start()
        else:
            self._run()
            self.wait()

    def _run(self) -> None:
        """Write, tell the others, and complete the checkpoint on rank 0; what goes wrong is raised by ``wait``."""
        told: dict[str, Any]
        try:
            with failed_writes_named(self._directory, rank=dist.get_rank()):
                told = {"file": asdict(self._write(self._abandoned.is_set))}
        except Exception as error:  # noqa: BLE001 whatever it is, the others must not wait for this rank
            self._error, told = error, {"error": _words(error)}
            logger.error("a checkpoint could not be written: %s", told["error"])  # in a thread, long before ``wait``
        if self._abandoned.is_set():
            return
        self._store.set(str(dist.get_rank()), json.dumps(told))
        if dist.get_rank() == 0:
            self._store.set(_END, self._completed())

    def wait(self) -> None:
        """Return when the checkpoint is complete and every rank knows it; a collective.

        Raises:
            CheckpointError: On every rank, if it failed on one; that rank raises its own error.
        """
        if self._thread.ident is not None:
            self._thread.join(2 * SLOWEST_WRITER_SECONDS)
        failure = self._take(_END)
        dist.barrier()  # rank 0 may end the job next, and with it the store that others still ask
        if self._error is not None:
            raise self._error
        if failure:
            raise CheckpointError(failure)

    def abandon(self) -> None:
        """Leave the checkpoint incomplete and end the thread: of a job that ends by an error; no collective.

        A thread that were still inside torch when Python ends would abort the process, with a status of its own.
        """
        self._abandoned.set()
        if self._thread.ident is not None:
            self._thread.join(_ABANDONED_SECONDS)

    def _completed(self) -> str:
        """Wait for all files and complete the checkpoint; return what went wrong, in words, or nothing."""
        try:
            told = [json.loads(self._take(str(rank))) for rank in range(dist.get_world_size())]
            if failed := [answer["error"] for answer in told if "error" in answer]:
                return str(failed[0])
            with failed_writes_named(self._directory):
                self._complete([WrittenFile(**answer["file"]) for answer in told])
        except Exception as error:  # noqa: BLE001 as above
            self._error = error
            logger.error("a checkpoint could not be completed: %s", _words(error))
            return _words(error)
        return ""

    def _take(self, key: str) -> str:
        """Return what a rank has told, once it has."""
        started, pause = time.monotonic(), 0.01
        while not self._store.check([key]):
            if self._abandoned.is_set():
                raise CheckpointError("the job has ended before all ranks had written their files.")
            if time.monotonic() - started > SLOWEST_WRITER_SECONDS:
                raise CheckpointError(
                    f"a checkpoint was not complete {SLOWEST_WRITER_SECONDS:.0f} s after this rank had written its "
                    "file: some rank's storage has stalled. Look at the logs of the other ranks."
                )
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)
        told = self._store.get(key).decode()
        if key != _END:
            self._store.delete_key(key)  # rank 0 holds the store of the whole job in its memory
        return told


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, MegatronAdsError) else f"{type(error).__name__}: {error}"


def prepare(directory: Path, final: Path, partial: Path) -> None:
    """Make room for a save: remove what saves that were cut off have left, and make the temporary folder."""
    if final.exists():
        raise CheckpointError(f"{final} already exists; delete it or choose another checkpoint.dir.")
    for leftover in partial_checkpoints(directory):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def publish(partial: Path, final: Path, files: Iterable[WrittenFile], manifest: dict[str, Any]) -> None:
    """Add the files that no rank wrote as its own, write the manifest last, and give the folder its name."""
    entries = {file.name: {"bytes": file.bytes, "crc32": file.crc32} for file in files}
    for file in partial.rglob("*"):
        if file.is_file() and (name := str(file.relative_to(partial))) not in entries:
            entries[name] = flushed(file)
    temporary = partial / f"{MANIFEST}.partial"
    with temporary.open("w", encoding="utf-8") as handle:
        json.dump(manifest | {"files": dict(sorted(entries.items()))}, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.rename(partial / MANIFEST)
    sync_folder(partial)
    partial.rename(final)
    sync_folder(final.parent)


def flushed(file: Path) -> dict[str, int]:
    """Flush a small file, which others have written, to disk; return its size and checksum."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
    return {"bytes": file.stat().st_size, "crc32": checksum(file)}


def remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves a folder without its manifest, never a damaged one."""
    doomed = folder.with_name(f".{folder.name}.partial")
    folder.rename(doomed)
    shutil.rmtree(doomed)
