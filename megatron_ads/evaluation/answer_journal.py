"""What an interrupted evaluation has already answered, so that the same command goes on where it stopped.

The journal lies beside the file of answers: one JSON line that says what is evaluated, then one per answered batch. A
line that a killed run did not finish is left out; its batch is answered again.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError
from megatron_ads.evaluation.answer import Answer, AnswerBeam
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)
_WEIGHTS_AND_SETTINGS = frozenset({".safetensors", ".distcp", ".pt", ".metadata", ".json", ".jinja"})


def fingerprint(model: Path, rows: Sequence[ChatRow], settings: Mapping[str, Any]) -> dict[str, str]:
    """Return what must be the same for an evaluation to go on, by what people call it.

    Of the model: names, sizes and modification times of its files; their bytes are not read.
    """
    files = sorted(
        (str(file.relative_to(model)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in model.rglob("*")
        if (file.suffix or file.name) in _WEIGHTS_AND_SETTINGS and file.is_file()
    )
    asked = [[row.id, row.task, *(message.content for message in row.messages)] for row in rows]
    parts = {"the model": files, "the held-out rows": asked, "the settings": sorted(settings.items())}
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}


class AnswerJournal:
    """An open, locked journal."""

    def __init__(self, path: Path, handle: IO[str], lines: Sequence[dict[str, Any]]) -> None:
        self._path, self._handle = path, handle
        self._done = {int(line["batch"]): line for line in lines}
        self.has_answers = bool(lines)
        """One that has none is not worth keeping."""

    @property
    def rows(self) -> int:
        """How many rows were answered before."""
        return sum(len(line["answers"]) for line in self._done.values())

    @property
    def seconds(self) -> float:
        """How long the batches answered before took."""
        return float(sum(line["seconds"] for line in self._done.values()))

    def answered(self, batch: int, rows: Sequence[ChatRow]) -> list[Answer] | None:
        """Return the answers to the rows of a batch, or None if it is still to be answered."""
        line = self._done.get(batch)
        if line is None:
            return None
        return [
            Answer(row, said["text"], said["ended"], tuple(AnswerBeam(*beam) for beam in said["beams"]))
            for row, said in zip(rows, line["answers"], strict=True)
        ]

    def add(self, batch: int, answers: Sequence[Answer], seconds: float) -> None:
        """Note an answered batch durably."""
        said = [
            {
                "text": answer.text,
                "ended": answer.ended,
                "beams": [[beam.text, beam.log_probability, beam.score] for beam in answer.beams],
            }
            for answer in answers
        ]
        self.write({"batch": batch, "seconds": seconds, "answers": said})
        self.has_answers = True

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line durably."""
        self._handle.write(json.dumps(line) + "\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def close_for_good(self) -> None:
        """Delete the journal: the file of answers is complete."""
        self._path.unlink()


@contextmanager
def open_journal(answers_file: Path, of: Mapping[str, str]) -> Iterator[AnswerJournal]:
    """Open and lock the journal of a file of answers; one of another evaluation is begun anew, and that is logged.

    Raises:
        DataError: If it cannot be written, or another process is writing it.
    """
    path = answers_file.with_name(f"{answers_file.name}.journal")
    try:
        handle = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}). Choose another --answers.") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is writing {answers_file}. Wait for it, or stop it.") from None
        head, *batches = _read_lines(path) or [{}]
        changed = [name for name in of if head.get(name) != of[name]]
        if head and changed:
            logger.info("%s is of another evaluation: %s changed. It begins anew.", path, " and ".join(changed))
        if changed:
            handle.truncate(0)
            batches = []
        journal = AnswerJournal(path, handle, batches)
        if changed:
            journal.write(of)
        elif batches:
            logger.info("%d rows were answered before the interruption; going on.", journal.rows)
        try:
            yield journal
        finally:
            if not journal.has_answers:
                path.unlink(missing_ok=True)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines; one that a killed run did not finish is cut off."""
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        os.truncate(path, len(whole) + bool(whole))
    return [json.loads(line) for line in whole.splitlines()]
