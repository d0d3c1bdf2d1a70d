"""What an interrupted evaluation has already answered, so that the same command goes on where it stopped.

The journal lies beside the file of answers: what is evaluated, then a record per answered batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ads.data.rows import ChatRow
from megatron_ads.evaluation.answer import Answer, AnswerBeam
from megatron_ads.inference.model_folder import model_state
from megatron_ads.journal import Journal, digest_of
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)
_OF = "of"
"""Key of what is evaluated; the other keys are numbers of batches."""


def fingerprint(model: Path, rows: Sequence[ChatRow], settings: Mapping[str, Any]) -> dict[str, str]:
    """Return what must be the same for an evaluation to go on, by what people call it."""
    asked = [[row.id, row.task, *(message.content for message in row.messages)] for row in rows]
    return {
        "the model": model_state(model),
        "the held-out rows": digest_of(asked),
        "the settings": digest_of(settings),
    }


class AnswerJournal:
    """An open, locked journal."""

    def __init__(self, journal: Journal) -> None:
        """Take over what it holds."""
        self._journal = journal
        done = [journal.read(key, _size) or (0, 0.0) for key in journal.records if key != _OF]
        self.rows = sum(rows for rows, _ in done)
        """How many rows were answered before."""
        self.seconds = sum(seconds for _, seconds in done)
        """How long the batches answered before took."""

    def answered(self, batch: int, rows: Sequence[ChatRow]) -> list[Answer] | None:
        """Return the answers to the rows of a batch, or None if it is still to be answered."""
        return self._journal.read(str(batch), partial(_answers, rows))

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
        self._journal.add(str(batch), {"seconds": seconds, "answers": said})

    def close_for_good(self) -> None:
        """Delete the journal: the file of answers is complete."""
        self._journal.delete()


def _size(record: Mapping[str, Any]) -> tuple[int, float]:
    """Return how many rows a batch had, and how long it took."""
    return len(record["answers"]), float(record["seconds"])


def _answers(rows: Sequence[ChatRow], record: Mapping[str, Any]) -> list[Answer]:
    return [
        Answer(row, said["text"], said["ended"], tuple(AnswerBeam(*beam) for beam in said["beams"]))
        for row, said in zip(rows, record["answers"], strict=True)
    ]


@contextmanager
def open_journal(answers_file: Path, of: Mapping[str, str]) -> Iterator[AnswerJournal]:
    """Open and lock the journal of a file of answers; one of another evaluation is begun anew, and that is logged.

    Raises:
        DataError: If it cannot be written or read, somebody has edited it, or another process is writing it.
    """
    path = answers_file.with_name(f"{answers_file.name}.journal")
    with Journal(path) as journal:
        before = journal.records.get(_OF, {})
        changed = [name for name in of if before.get(name) != of[name]]
        if before and changed:
            logger.info("%s is of another evaluation: %s changed. It begins anew.", path, " and ".join(changed))
        if changed:
            journal.clear()
            journal.add(_OF, of)
        answers = AnswerJournal(journal)
        if answers.rows:
            logger.info("%d rows were answered before the interruption; going on.", answers.rows)
        try:
            yield answers
        finally:
            if journal.records.keys() == {_OF}:  # without answers it is not worth keeping
                journal.delete()
