"""What an interrupted conversion has already finished, so that ``--resume`` need not do it again.

One JSON line for the plan, then one per finished file. A line is appended after its file has got its final name.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from conversion.atomic_file import PARTIAL_SUFFIX, FileRecord, hash_file
from conversion.plan import ConversionPlan, OutputFile
from megatron_ads.errors import ConversionError

JOURNAL = ".conversion-journal.jsonl"


class Journal:
    """The open, locked journal of one target folder."""

    def __init__(self, plan: ConversionPlan, handle: IO[str]) -> None:
        self._plan = plan
        self._handle = handle
        self.finished: dict[str, FileRecord] = {}

    def add(self, record: FileRecord) -> None:
        """Note a finished file durably."""
        self.finished[record.name] = record
        modified = (self._plan.target / record.name).stat().st_mtime_ns
        self._append(asdict(record) | {"mtime_ns": modified})

    def close_for_good(self) -> None:
        """Delete the journal: the conversion is complete."""
        (self._plan.target / JOURNAL).unlink()

    def _append(self, line: dict[str, Any]) -> None:
        self._handle.write(json.dumps(line) + "\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def start(self) -> None:
        """Write the line that ties this journal to a plan and a source."""
        self._append({"plan": self._plan.digest, "source": str(self._plan.source), "state": self._plan.source_state})

    def recover(self, lines: list[dict[str, Any]]) -> None:
        """Take over the finished files of an earlier run of the same plan, whose lines stay as they are.

        A file that was touched since is hashed again, and left out if it differs. A file that got its name just
        before the earlier run was killed, and so has no line, is complete: it is hashed and noted.
        """
        known = {str(line["name"]): line for line in lines}  # the last of a file that was made twice
        for file in self._plan.files:
            path = self._plan.target / file.name
            if not path.exists():
                continue
            record = _recovered(path, file, known.get(file.name))
            if record is None:
                continue
            if file.name in known:
                self.finished[file.name] = record
            else:
                self.add(record)


def _recovered(path: Path, file: OutputFile, line: dict[str, Any] | None) -> FileRecord | None:
    status = path.stat()
    if line is not None:
        untouched = (status.st_size, status.st_mtime_ns) == (line["nbytes"], line["mtime_ns"])
        extents = tuple((offset, length) for offset, length in line["extents"])
        record = FileRecord(file.name, line["nbytes"], line["sha256"], extents)
        return record if untouched or hash_file(path) == record.sha256 else None
    if not file.header or status.st_size != file.nbytes:
        return None
    with path.open("rb") as handle:
        if handle.read(len(file.header)) != file.header:
            return None
    return FileRecord(file.name, file.nbytes, hash_file(path))


@contextmanager
def open_journal(plan: ConversionPlan, *, resume: bool) -> Iterator[Journal]:
    """Lock the target folder and open its journal.

    Raises:
        ConversionError: If the folder is inside the source, holds foreign files, is complete, is being written by
            another process, holds an unfinished conversion and ``resume`` is false, or one of another plan or of a
            source that has changed.
    """
    _check_target(plan, resume=resume)
    plan.target.mkdir(parents=True, exist_ok=True)
    path = plan.target / JOURNAL
    with path.open("a+", encoding="utf-8") as handle:
        _lock(handle, plan.target)
        lines, whole = _read_lines(path)
        if lines:
            _check_same(plan, lines[0])
        _check_foreign(plan)
        journal = Journal(plan, handle)
        _remove_partial_files(plan.target)
        handle.truncate(whole)
        if not lines:
            journal.start()
        journal.recover(lines[1:])
        yield journal


def _check_target(plan: ConversionPlan, *, resume: bool) -> None:
    if plan.source.resolve() in plan.target.resolve().parents:  # or its files would be side files of the source
        raise ConversionError(f"{plan.target} lies inside the source {plan.source}. Choose a folder outside of it.")
    if not plan.target.exists():
        return
    if not plan.target.is_dir():
        raise ConversionError(f"{plan.target} is a file. Give a folder that is empty or absent.")
    if not (plan.target / JOURNAL).exists():
        _check_foreign(plan)
        if any(plan.target.iterdir()):
            raise ConversionError(
                f"{plan.target} holds a complete checkpoint already. Choose a folder that is empty or absent."
            )
    elif not resume:
        raise ConversionError(
            f"{plan.target} holds an unfinished conversion. Go on with --resume, or delete the folder."
        )


def _check_foreign(plan: ConversionPlan) -> None:
    ours = {file.name for file in plan.files} | {Path(name).parts[0] for name in plan.finishing} | {JOURNAL}
    found = (file.name for file in plan.target.iterdir() if not file.name.endswith(PARTIAL_SUFFIX))
    if foreign := sorted(set(found) - ours):
        raise ConversionError(
            f"{plan.target} holds files of something else, such as {foreign[0]}. "
            "Choose a folder that is empty or absent."
        )


def _lock(handle: IO[str], target: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConversionError(f"Another process is converting into {target}. Wait for it, or stop it.") from None


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines and how many bytes they take; the last line of a killed run may be torn."""
    lines, whole = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
        whole += len(line)
    return lines, whole


def _check_same(plan: ConversionPlan, first: dict[str, Any]) -> None:
    if first["plan"] != plan.digest:
        raise ConversionError(
            f"{plan.target} holds an unfinished conversion with other settings or of another model. "
            "Resume with the settings it was started with, or delete the folder."
        )
    if first["state"] != plan.source_state:
        raise ConversionError(
            f"The source {plan.source} has changed since the conversion into {plan.target} began (names, sizes or "
            "modification times of its files). Delete the folder and convert again."
        )


def _remove_partial_files(target: Path) -> None:
    for file in target.glob(f"*{PARTIAL_SUFFIX}"):
        file.unlink()
