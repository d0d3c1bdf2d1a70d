"""Answers that were paid for: one JSON object a line, appended, on disk before anybody uses it, found by its request.

A run that was killed finds every answer it had got and asks for the others only. What was in flight at that moment has
no answer and is asked for again.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from megatron_ads.errors import DataError


def key_of(request: Mapping[str, Any]) -> str:
    """Return what a request is found by: a hash of everything that could change its answer."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Journal:
    """One open journal; one process at a time has it, many threads may add to it."""

    def __init__(self, file: Path) -> None:
        """Open or create ``file`` and read what it holds.

        Raises:
            DataError: If another process has it open, or a line other than a last, torn one cannot be read.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._lock = Lock()
        self._descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        try:
            self._claim()
            self._records = self._read()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return what was recorded under ``key``; None if nothing was."""
        return self._records.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Record an answer; it is on disk when this returns."""
        line = json.dumps({"key": key, **record}, ensure_ascii=True).encode() + b"\n"
        with self._lock:
            self._records[key] = dict(record)
            view = memoryview(line)
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fsync(self._descriptor)

    def _claim(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{self._file} is in use by another run. Wait for it, or cook into another folder with --out."
            ) from None

    def _read(self) -> dict[str, dict[str, Any]]:
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.ftruncate(self._descriptor, len(whole))  # the writer was killed within a line
        records: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                records[record.pop("key")] = record
            except (ValueError, TypeError, AttributeError, KeyError):
                raise DataError(
                    f"{self._file}, line {number} is not a record of this journal. Remove the line; its answer is then "
                    "asked for again."
                ) from None
        return records
