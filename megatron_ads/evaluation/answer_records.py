"""What a model said to held-out rows: the record, its file, and the journal of an interrupted evaluation.

The journal lies beside the file of answers: what is evaluated, then a record per answered batch, or per request to a
server. The same command continues where it stopped.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.inference.model_folder import model_state
from megatron_ads.journal import Journal, digest_of
from megatron_ads.observability.log import get_logger
from megatron_ads.rows import ChatRow

logger = get_logger(__name__)
_OF = "of"
"""Key of what is evaluated; the other keys are numbers of batches, or digests of requests."""


@dataclass(frozen=True, slots=True)
class AnswerBeam:
    """One of several answers to a row."""

    text: str
    log_probability: float
    """The model's, in nats; of a valid name: given that the answer is one, without reasoning."""
    score: float
    """What beams are ordered by; of samples, the share that says the same."""
    samples: int | None = None
    """How many samples say the same; None: a beam of a search."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one held-out row."""

    row: ChatRow
    text: str
    """Special tokens are left out."""
    ended: bool | None
    """The model ended the answer itself; False: it was cut off at the limit; None: who made the answer did not say."""
    beams: tuple[AnswerBeam, ...] = ()
    """Where there are beams, or several samples: the best, whose text this answer has, and the others in order."""


def write_answers(file: Path, answers: Sequence[Answer]) -> None:
    """Write every answer as one JSON line; the file appears when it is complete. Other answers there are kept aside."""
    lines = []
    for answer in answers:
        row = answer.row
        said: dict[str, Any] = {"id": row.id, "task": row.task, "prompt": row.prompt[-1].content, "target": row.target}
        said |= {"expected": row.label, "ended": answer.ended, "text": answer.text}
        said |= {"source": row.source} if row.source else {}
        beams = {"beams": list(map(_described, answer.beams))} if answer.beams else {}
        lines.append(json.dumps(said | beams, ensure_ascii=False) + "\n")
    text = "".join(lines)
    if file.exists() and file.read_bytes() != text.encode():
        names = (file.with_name(f"{file.name}.{number}") for number in count(1))
        kept = next(name for name in names if not name.exists())
        file.rename(kept)
        logger.warning("%s held other answers; they are kept as %s.", file, kept)
    write_small(file, text)


def _described(beam: AnswerBeam) -> dict[str, Any]:
    return {name: value for name, value in asdict(beam).items() if value is not None}


def ended_share(answers: Sequence[Answer]) -> float | None:
    """Return the share of answers that the model ended itself; None where it is not known of all."""
    ended = [answer.ended for answer in answers if answer.ended is not None]
    return sum(ended) / len(ended) if len(ended) == len(answers) else None


def fingerprint(model: Path, rows: Sequence[ChatRow], settings: Mapping[str, Any]) -> dict[str, str]:
    """Return what must be the same for an evaluation to continue, by what people call it."""
    asked = [[row.id, row.task, *(message.content for message in row.messages)] for row in rows]
    return {"the model": model_state(model), "the held-out rows": digest_of(asked), "the settings": digest_of(settings)}


@contextmanager
def open_journal(answers_file: Path, of: Mapping[str, str]) -> Iterator[Journal]:
    """Open and lock the journal of a file of answers; one of another evaluation is begun anew, and that is logged.

    Raises:
        DataError: If it cannot be written or read, somebody has edited it, or another process is writing it.
    """
    path = answers_file.with_name(f"{answers_file.name}.journal")
    with Journal(path) as journal:
        before = journal.records.get(_OF, {})
        changed = [name for name in {**of, **before} if before.get(name) != of.get(name)]
        if before and changed:
            logger.info("%s is of another evaluation: %s changed. It begins anew.", path, " and ".join(changed))
        if changed:
            journal.clear()
            journal.add(_OF, of)
        try:
            yield journal
        finally:
            if journal.records.keys() == {_OF}:  # without answers it is not worth keeping
                journal.delete()


class AnswerJournal:
    """The answered batches of an open journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

        def size(record: Mapping[str, Any]) -> tuple[int, float]:
            return len(record["answers"]), float(record["seconds"])

        done = [journal.read(key, size) or (0, 0.0) for key in journal.records if key != _OF]
        self.rows = sum(rows for rows, _ in done)
        """How many rows were answered before."""
        self.seconds = sum(seconds for _, seconds in done)
        """How long the batches answered before took."""
        if self.rows:
            logger.info("%d rows were answered before the interruption; continuing.", self.rows)

    def answered(self, batch: int, rows: Sequence[ChatRow]) -> list[Answer] | None:
        """Return the answers to the rows of a batch, or None if it is still to be answered."""

        def answers(record: Mapping[str, Any]) -> list[Answer]:
            return [
                Answer(row, said["text"], said["ended"], tuple(AnswerBeam(*beam) for beam in said["beams"]))
                for row, said in zip(rows, record["answers"], strict=True)
            ]

        return self._journal.read(str(batch), answers)

    def add(self, batch: int, answers: Sequence[Answer], seconds: float) -> None:
        said = [
            {"text": answer.text, "ended": answer.ended, "beams": [astuple(beam) for beam in answer.beams]}
            for answer in answers
        ]
        self._journal.add(str(batch), {"seconds": seconds, "answers": said})
