"""What an interrupted conversion has already finished, so that ``--resume`` does not repeat it.

The journal holds what is converted, then a record of each finished file, made after the file was renamed into place.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conversion.atomic_file import PARTIAL_SUFFIX, FileRecord, hash_file
from conversion.plan import ConversionPlan, OutputFile
from megatron_ads.errors import ConversionError
from megatron_ads.journal import Journal

JOURNAL = ".conversion-journal.jsonl"
_PLAN = "plan"
"""Key of what is converted; the other keys are names of files."""


class ConversionJournal:
    """The open, locked journal of one target folder."""

    def __init__(self, plan: ConversionPlan, journal: Journal) -> None:
        self._plan, self._journal = plan, journal
        self.finished: dict[str, FileRecord] = {}

    def add(self, record: FileRecord) -> None:
        """Record a finished file durably."""
        modified = (self._plan.target / record.name).stat().st_mtime_ns
        self._journal.add(record.name, asdict(record) | {"mtime_ns": modified})
        self.finished[record.name] = record

    def recover(self) -> None:
        """Take over the finished files of an earlier run of the same plan.

        A file that was touched since is hashed again, and left out if it differs. A file that got its name just
        before the earlier run was killed, and so has no record, is complete: it is hashed and recorded.
        """
        for file in self._plan.files:
            path = self._plan.target / file.name
            if not path.exists():
                continue
            recorded = self._journal.read(file.name, _recorded)
            if recorded is None:
                if (record := _unrecorded(path, file)) is not None:
                    self.add(record)
                continue
            record, mtime_ns = recorded
            untouched = (path.stat().st_size, path.stat().st_mtime_ns) == (record.nbytes, mtime_ns)
            if untouched or hash_file(path) == record.sha256:
                self.finished[file.name] = record


def _recorded(record: Mapping[str, Any]) -> tuple[FileRecord, int]:
    """Return a finished file and when it was modified, in nanoseconds."""
    extents = tuple((int(offset), int(length)) for offset, length in record["extents"])
    file = FileRecord(str(record["name"]), int(record["nbytes"]), str(record["sha256"]), extents)
    return file, int(record["mtime_ns"])


def _unrecorded(path: Path, file: OutputFile) -> FileRecord | None:
    if not file.header or path.stat().st_size != file.nbytes:
        return None
    with path.open("rb") as handle:
        if handle.read(len(file.header)) != file.header:
            return None
    return FileRecord(file.name, file.nbytes, hash_file(path))


@contextmanager
def open_journal(plan: ConversionPlan, *, resume: bool) -> Iterator[ConversionJournal]:
    """Lock the target folder and open its journal, which is deleted when the block ends without an error.

    Raises:
        ConversionError: If the folder is inside the source, holds foreign files, is complete, holds an unfinished
            conversion and ``resume`` is false, or one of another plan or of a source that has changed.
        DataError: If another process is writing the folder, or a line of its journal is damaged.
    """
    _check_target(plan)
    plan.target.mkdir(parents=True, exist_ok=True)
    unfinished = (plan.target / JOURNAL).exists()
    with Journal(plan.target / JOURNAL) as lines:  # refuses while another process is at work
        if unfinished and not resume:
            raise ConversionError(
                f"{plan.target} holds an unfinished conversion. Continue with --resume, or delete the folder."
            )
        before = lines.read(_PLAN, lambda record: (record["digest"], record["state"]))
        digest, source_state = before or (plan.digest, plan.source_state)
        if digest != plan.digest:
            raise ConversionError(
                f"{plan.target} holds an unfinished conversion with other settings or of another model. "
                "Resume with the settings it was started with, or delete the folder."
            )
        if source_state != plan.source_state:
            raise ConversionError(
                f"The source {plan.source} has changed since the conversion into {plan.target} began (names, sizes or "
                "modification times of its files). Delete the folder and convert again."
            )
        _check_foreign(plan)
        for file in plan.target.rglob(f"*{PARTIAL_SUFFIX}"):
            file.unlink()
        journal = ConversionJournal(plan, lines)
        if before is None:
            lines.clear()  # earlier records that are not tied to a plan and a source are not trusted
            state = {"digest": plan.digest, "source": str(plan.source), "state": plan.source_state}
            lines.add(_PLAN, state)
        else:
            journal.recover()
        yield journal
        lines.delete()


def _check_target(plan: ConversionPlan) -> None:
    for word, folder in (("source", plan.source), ("reference", plan.reference)):
        if folder and folder.resolve() in plan.target.resolve().parents:  # it would be carried with the next one
            raise ConversionError(f"{plan.target} is inside the {word} {folder}. Choose a folder outside it.")
    if plan.target.is_symlink() and not plan.target.exists():
        raise ConversionError(f"{plan.target} is a link that leads nowhere. Make the folder it names, or delete it.")
    if not plan.target.exists():
        return
    if not plan.target.is_dir():
        raise ConversionError(f"{plan.target} is a file. Give a folder that is empty or absent.")
    if not (plan.target / JOURNAL).exists():
        _check_foreign(plan)
        if any(plan.target.iterdir()):
            raise ConversionError(
                f"{plan.target} already holds a complete checkpoint. Choose a folder that is empty or absent."
            )


def _check_foreign(plan: ConversionPlan) -> None:
    written = (*(file.name for file in plan.files), *plan.finishing)
    ours = {Path(name).parts[0] for name in written} | {JOURNAL}
    found = (file.name for file in plan.target.iterdir() if not file.name.endswith(PARTIAL_SUFFIX))
    if foreign := sorted(set(found) - ours):
        raise ConversionError(
            f"{plan.target} holds unrelated files, such as {foreign[0]}. Choose a folder that is empty or absent."
        )
