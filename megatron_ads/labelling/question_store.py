"""The rows of a job, read once, in epochs: what each row asks, on disk until it is labelled.

    DIR/questions/000012.parquet    rows that are still to be labelled; removed once DIR/labels/000012.parquet is there
    DIR/questions/complete.json     all rows were read: how many, and what became of those that are not asked

An epoch's file also says how far its sources have been read, so that a job that was killed reads on behind it.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from conversion.atomic_file import write_small
from megatron_ads.config.labelling import LabelConfig
from megatron_ads.data.questions import BadQuestion, questions
from megatron_ads.errors import DataError
from megatron_ads.labelling.job_identity import with_their_previous
from megatron_ads.labelling.parquet_files import epoch_files, metadata_of, read_table, remove_partial, write_table
from megatron_ads.labelling.selection import Labelled, UserSelection
from megatron_ads.rows import ChatRow, Fact, Message, Role
from megatron_ads.stable_random import stable_key
from megatron_ads.tasks.registry import TASKS

QUESTIONS, LABELS, JOURNALS = "questions", "labels", "journals"
_COMPLETE = "complete.json"
_ALL_BAD = 100
"""If so many rows of a source cannot be asked from its first on, it is its settings that are wrong."""
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()), ("source", pa.int32()), ("id", pa.string()), ("task", pa.string()),
        ("user", pa.string()), ("roles", pa.list_(pa.string())), ("contents", pa.list_(pa.string())),
        ("digest", pa.binary(16)), ("fault", pa.string()), ("why", pa.string()),
    ]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What one row asks."""

    row: int
    """Number in its source, from 0."""
    source: int
    id: str
    task: str
    user: str = ""
    """Its user's id; empty: it is about none."""
    messages: tuple[Message, ...]
    digest: bytes
    """Of task and messages, the wording of the task's instruction left out: a row that asks the same, whenever and
    under whatever id, has the same."""
    fault: str | None = None
    """Why it cannot be asked: the kind of reason."""
    why: str | None = None
    """And the reason itself."""


@dataclass(kw_only=True, slots=True)
class ReadSoFar:
    """How far the sources have been read."""

    rows: list[int]
    """Of each source, how many of its rows were passed."""
    finished: list[int] = field(default_factory=list)
    """Sources that were read to their ends."""
    epochs: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Rows read and rows not asked, by reason."""

    def as_json(self) -> str:
        """Return it as a text."""
        return json.dumps({part.name: getattr(self, part.name) for part in fields(self)})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return what ``as_json`` wrote."""
        given = json.loads(text)
        return cls(**{**given, "counts": Counter(given["counts"])})


class QuestionStore:
    """The epochs of one job's folder."""

    def __init__(self, folder: Path, config: LabelConfig) -> None:
        self._folder, self._config = folder, config
        self._of_epochs, self._labels, self.journals = folder / QUESTIONS, folder / LABELS, folder / JOURNALS
        for each in (self._of_epochs, self._labels, self.journals):
            each.mkdir(parents=True, exist_ok=True)

    def file(self, epoch: int) -> Path:
        """Return where the questions of an epoch are until it is labelled."""
        return self._of_epochs / f"{epoch:06d}.parquet"

    def labels_file(self, epoch: int) -> Path:
        """Return where the labels of an epoch are."""
        return self._labels / f"{epoch:06d}.parquet"

    def journal_file(self, epoch: int) -> Path:
        """Return where the answers are that an epoch has so far, while it is being labelled."""
        return self.journals / f"{epoch:06d}.jsonl"

    def waiting(self) -> list[int]:
        """Return the epochs that are read and not labelled, in order; what labelled epochs left is removed."""
        numbers = [int(file.stem) for file in epoch_files(self._of_epochs)]
        for number in numbers:
            if self.labels_file(number).exists():
                self.file(number).unlink(missing_ok=True)
        return [number for number in numbers if not self.labels_file(number).exists()]

    @property
    def is_labelled(self) -> bool:
        """Whether some epoch has its labels."""
        return bool(epoch_files(self._labels))

    def require_whole(self) -> None:
        """Refuse a folder out of which an epoch was taken: its rows would be lost; and tidy up behind a killed job.

        Raises:
            DataError: If there are neither questions nor labels of an epoch that was read.
        """
        for folder in (self._of_epochs, self._labels):
            remove_partial(folder)
        there = {int(file.stem) for folder in (self._of_epochs, self._labels) for file in epoch_files(folder)}
        if lost := sorted(set(range(self.read_so_far().epochs)) - there):
            raise DataError(
                f"{self.labels_file(lost[0])} is missing. Restore it, or label into a new --out with "
                f"'previous=[{self._folder}]', which labels its rows again."
            )

    def clear(self) -> None:
        """Forget what was read."""
        for file in [self._of_epochs / _COMPLETE, *epoch_files(self._of_epochs)]:
            file.unlink(missing_ok=True)

    def read_so_far(self) -> ReadSoFar:
        """Return how far the sources have been read into epochs."""
        if (complete := self.all_read()) is not None:
            return complete
        last = [files[-1] for folder in (self._of_epochs, self._labels) if (files := epoch_files(folder))]
        if not last:
            return ReadSoFar(rows=[0] * len(self._config.sources))
        return ReadSoFar.from_json(metadata_of(max(last, key=lambda file: int(file.stem)))["read"])

    def rows_passed(self, epoch: int | None = None) -> int:
        """Return how many rows of the sources were read up to the end of an epoch; None: of the last labelled one."""
        if epoch is None:
            epoch = max((int(file.stem) for file in epoch_files(self._labels)), default=-1)
        found = [file for file in (self.labels_file(epoch), self.file(epoch)) if epoch >= 0 and file.exists()]
        return ReadSoFar.from_json(metadata_of(found[0])["read"]).counts["read"] if found else 0

    def all_read(self) -> ReadSoFar | None:
        """Return what was read, once that is everything."""
        file = self._of_epochs / _COMPLETE
        return ReadSoFar.from_json(file.read_bytes()) if file.exists() else None

    def read_epochs(self, *, stop_after: int | None = None) -> Iterator[int]:
        """Read on, and yield the number of each epoch when it is on disk.

        Args:
            stop_after: How many epochs to read; None: all there are.

        Raises:
            ConfigError: If a source has a setting that has no effect here.
            DataError: If a source cannot be read, none of its rows can be asked, or earlier labels are damaged.
        """
        so_far = self.read_so_far()
        if self.all_read() is not None or stop_after == 0:
            return
        labelled = Labelled.of([folder / LABELS for folder in with_their_previous(self._config.previous)])
        first, asked, new = so_far.epochs, self._asked(so_far), list[Question]()
        while batch := list(islice(asked, self._config.rows_per_epoch - len(new))):
            known = labelled.known([question.digest for question in batch])
            new += [question for question, is_known in zip(batch, known, strict=True) if not is_known]
            so_far.counts["spared"] += int(known.sum())
            if len(new) == self._config.rows_per_epoch:
                yield self._write(new, so_far)
                new = []
                if so_far.epochs - first == stop_after:
                    return
        if new:
            yield self._write(new, so_far)
        write_small(self._of_epochs / _COMPLETE, so_far.as_json())

    def _asked(self, so_far: ReadSoFar) -> Iterator[Question]:
        """Yield the rows that are to be asked, from where ``so_far`` is, which is kept up to date."""
        selection, config = UserSelection(self._config.select), self._config
        left = [number for number in range(len(config.sources)) if number not in so_far.finished]
        for number in sorted(left, key=lambda number: config.priorities.get(str(config.sources[number].task), 0)):
            source, name, bad = config.sources[number], f"sources[{number}]", 0
            for place, row in enumerate(
                questions(source, name, seed=config.seed, first=so_far.rows[number]), so_far.rows[number]
            ):
                so_far.rows[number] += 1
                so_far.counts["read"] += 1
                bad = bad + 1 if isinstance(row, BadQuestion) and bad == place else -1
                if isinstance(row, BadQuestion) and bad == _ALL_BAD:
                    raise DataError(
                        f"{name}: none of its first {bad} rows can be asked, the last as {row.reason}: {row.message} "
                        "Correct the source's settings."
                    )
                if isinstance(row, BadQuestion):
                    yield Question(
                        row=place, source=number, id=row.id, task=str(source.task or ""), messages=(),
                        digest=stable_key(number, place)[:16], fault=row.reason, why=row.message,
                    )  # fmt: skip
                elif row is None:
                    so_far.counts["left out"] += 1
                elif (reason := selection.left_out(row)) is not None:
                    so_far.counts[reason] += 1
                else:
                    yield _question(row, number, place)
            so_far.finished.append(number)

    def _write(self, asked: Sequence[Question], so_far: ReadSoFar) -> int:
        epoch, so_far.epochs = so_far.epochs, so_far.epochs + 1
        columns: dict[str, list[Any]] = {
            name: [getattr(one, name) for one in asked]
            for name in ("row", "source", "id", "task", "user", "digest", "fault", "why")
        }
        columns["roles"] = [[str(message.role) for message in one.messages] for one in asked]
        columns["contents"] = [[message.content for message in one.messages] for one in asked]
        write_table(self.file(epoch), pa.table(columns, _SCHEMA), {"read": so_far.as_json()})
        return epoch

    def questions_of(self, epoch: int) -> list[Question]:
        """Return the questions of an epoch that waits.

        Raises:
            DataError: If its file is damaged.
        """
        columns = read_table(self.file(epoch)).to_pydict()
        roles, contents = columns.pop("roles"), columns.pop("contents")
        return [
            Question(**dict(zip(columns, values, strict=True)), messages=_messages(*said))
            for values, said in zip(zip(*columns.values(), strict=True), zip(roles, contents, strict=True), strict=True)
        ]


_ROLES = {str(role): role for role in Role}


def _messages(roles: Sequence[str], contents: Sequence[str]) -> tuple[Message, ...]:
    return tuple(Message(_ROLES[role], content) for role, content in zip(roles, contents, strict=True))


_WORDINGS = {
    wording: template.name
    for task in TASKS.values()
    for template in task.templates
    for wording in template.instructions()
}
"""Of one instruction, a row's id picks the wording; that of a row without one changes when others come before it."""


def _without_wording(content: str) -> str:
    instruction, mark, shown = content.partition("\n")
    return f"{_WORDINGS.get(instruction, instruction)}{mark}{shown}"


def _question(row: ChatRow, source: int, place: int) -> Question:
    user = row.facts.get(Fact.user)
    said = [part for message in row.prompt for part in (message.role, _without_wording(message.content))]
    return Question(
        row=place,
        source=source,
        id=row.id,
        task=row.task,
        user=user if isinstance(user, str) else "",
        messages=row.prompt,
        digest=stable_key(row.task, *said, separator="\0")[:16],
    )
