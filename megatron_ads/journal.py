"""What a job has done already, on disk as soon as it is done: one JSON object a line, appended, found by its key.

A job that was killed finds every record it had made. A line that it did not finish is cut off at the next opening.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, Self, TypeVar

from megatron_ads.errors import DataError

_T = TypeVar("_T")


def digest_of(value: object) -> str:
    """Return a hash of JSON values, independent of the order of their fields."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Journal:
    """One open journal; one process at a time has it, many threads may add to it."""

    def __init__(self, file: Path) -> None:
        """Open or create ``file`` and read what it holds.

        Raises:
            DataError: If it cannot be written, another process has it open, or a line but a last, torn one is damaged.
        """
        self._file = file
        self._lock = Lock()
        try:
            self._descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        except OSError as error:
            raise self._cannot_be_written(error) from None
        with ExitStack() as on_failure:
            on_failure.callback(os.close, self._descriptor)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                said = f"another process is writing {file}. Wait for it, stop it, or choose another folder."
                raise DataError(said) from None
            self.records = self._read()
            """Everything that was recorded, by key, in the order of its first recording; ``add`` changes it."""
            on_failure.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, key: str, take: Callable[[Mapping[str, Any]], _T]) -> _T | None:
        """Return what ``take`` makes of a record; None if there is no record of this key.

        Raises:
            DataError: If ``take`` does not find what it looks for: it was edited, or written by another version.
        """
        if (record := self.records.get(key)) is None:
            return None
        try:
            return take(record)
        except (ValueError, TypeError, LookupError, AttributeError):
            raise self._damaged(f"the line of {key}") from None

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Record something, in place of what its key had; it is on disk when this returns.

        Raises:
            DataError: If it cannot be written, such as on a full disk; records made before are kept.
        """
        self.add_all({key: record})

    def add_all(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Record several things as ``add`` does, with one wait for the disk; of a killed job, the first of them."""
        lines = [json.dumps({"key": key, **record}, ensure_ascii=True) + "\n" for key, record in records.items()]
        view = memoryview("".join(lines).encode())
        with self._lock:
            size = os.fstat(self._descriptor).st_size
            try:
                while view:
                    view = view[os.write(self._descriptor, view) :]
                os.fsync(self._descriptor)
            except OSError as error:
                os.ftruncate(self._descriptor, size)  # no half line before what is added later
                raise self._cannot_be_written(error) from None
            self.records |= {key: dict(record) for key, record in records.items()}

    def clear(self) -> None:
        with self._lock:
            os.ftruncate(self._descriptor, 0)
            self.records.clear()

    def delete(self) -> None:
        self._file.unlink(missing_ok=True)

    def _read(self) -> dict[str, dict[str, Any]]:
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.ftruncate(self._descriptor, len(whole))  # the writer was killed while writing a line
        records: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                records[record.pop("key")] = record
            except (ValueError, TypeError, AttributeError, KeyError):
                raise self._damaged(f"line {number}") from None
        return records

    def _damaged(self, line: str) -> DataError:
        return DataError(
            f"{self._file}, {line} is not a record of this journal. Remove the line; what it recorded is then repeated."
        )

    def _cannot_be_written(self, error: OSError) -> DataError:
        return DataError(
            f"{self._file} cannot be written ({error.strerror}). Free some space, or choose another folder."
        )
