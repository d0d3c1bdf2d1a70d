"""The rows of a job, read once, in epochs: what each row asks, on disk until it is labelled.

    DIR/questions/000012.parquet    rows that are still to be labelled; removed once DIR/labels/000012.parquet is there
    DIR/questions/complete.json     all rows were read: how many, and what became of those that are not asked

An epoch's file also says how far its sources have been read, so that a job that was killed reads on behind it.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from conversion.atomic_file import write_small
from megatron_ads.config.labelling import LabelConfig
from megatron_ads.data.questions import BadQuestion, questions
from megatron_ads.errors import DataError
from megatron_ads.labelling.parquet_files import metadata_of, write_table
from megatron_ads.labelling.selection import Labelled, Selection
from megatron_ads.rows import ChatRow, Fact, Message, Role
from megatron_ads.stable_random import stable_key

QUESTIONS, LABELS = "questions", "labels"
_COMPLETE = "complete.json"
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()), ("source", pa.int32()), ("id", pa.string()), ("task", pa.string()),
        ("user", pa.string()), ("roles", pa.list_(pa.string())), ("contents", pa.list_(pa.string())),
        ("digest", pa.binary(16)), ("fault", pa.string()),
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
    """Of task and messages: a row that asks the same, whenever and under whatever id, has the same."""
    fault: str | None = None
    """Why it cannot be asked."""


@dataclass(kw_only=True, slots=True)
class ReadSoFar:
    """How far the sources have been read."""

    source: int = 0
    """The one that is being read."""
    row: int = 0
    """The next one of it."""
    epochs: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Rows read and rows not asked, by reason."""

    def as_json(self) -> str:
        """Return it as a text."""
        fields = {"source": self.source, "row": self.row, "epochs": self.epochs, "counts": dict(self.counts)}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return what ``as_json`` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "counts": Counter(fields["counts"])})


class QuestionStore:
    """The epochs of one job's folder."""

    def __init__(self, folder: Path, config: LabelConfig) -> None:
        self._folder, self._config = folder, config
        self._of_epochs, self._labels = folder / QUESTIONS, folder / LABELS
        for each in (self._of_epochs, self._labels):
            each.mkdir(parents=True, exist_ok=True)

    def file(self, epoch: int) -> Path:
        """Return where the questions of an epoch are until it is labelled."""
        return self._of_epochs / f"{epoch:06d}.parquet"

    def labels_file(self, epoch: int) -> Path:
        """Return where the labels of an epoch are."""
        return self._labels / f"{epoch:06d}.parquet"

    def waiting(self) -> list[int]:
        """Return the epochs that are read and not labelled, in order; what labelled epochs left is removed."""
        numbers = sorted(int(file.stem) for file in self._of_epochs.glob("[0-9]*.parquet"))
        for number in numbers:
            if self.labels_file(number).exists():
                self.file(number).unlink()
        return [number for number in numbers if not self.labels_file(number).exists()]

    def read_so_far(self) -> ReadSoFar:
        """Return how far the sources have been read into epochs."""
        if (complete := self.all_read()) is not None:
            return complete
        files = [file for folder in (self._of_epochs, self._labels) for file in folder.glob("[0-9]*.parquet")]
        if not files:
            return ReadSoFar()
        return ReadSoFar.from_json(metadata_of(max(files, key=lambda file: file.stem))["read"])

    def rows_passed(self, epoch: int | None = None) -> int:
        """Return how many rows of the sources were read up to the end of an epoch; None: of the last labelled one."""
        if epoch is None:
            epoch = max((int(file.stem) for file in self._labels.glob("[0-9]*.parquet")), default=-1)
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
            DataError: If a source cannot be read, or an earlier job's labels.
        """
        so_far = self.read_so_far()
        if self.all_read() is not None or stop_after == 0:
            return
        labelled = Labelled.of([Path(folder) / LABELS for folder in self._config.previous])
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
        selection, config = Selection(self._config.select), self._config
        for number in range(so_far.source, len(config.sources)):
            source, name = config.sources[number], f"sources[{number}]"
            for row in questions(source, name, seed=config.seed, first=so_far.row):
                place, so_far.row = so_far.row, so_far.row + 1
                so_far.counts["read"] += 1
                if isinstance(row, BadQuestion):
                    yield Question(
                        row=place, source=number, id=row.id, task=str(source.task or ""), messages=(),
                        digest=stable_key(number, place)[:16], fault=row.reason,
                    )  # fmt: skip
                elif row is None:
                    so_far.counts["left out"] += 1
                elif (reason := selection.left_out(row)) is not None:
                    so_far.counts[reason] += 1
                else:
                    yield _question(row, number, place)
            so_far.source, so_far.row = number + 1, 0

    def _write(self, asked: Sequence[Question], so_far: ReadSoFar) -> int:
        epoch, so_far.epochs = so_far.epochs, so_far.epochs + 1
        columns: dict[str, list[Any]] = {
            name: [getattr(one, name) for one in asked]
            for name in ("row", "source", "id", "task", "user", "digest", "fault")
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
        try:
            columns = pq.read_table(self.file(epoch)).to_pydict()
        except (OSError, pa.ArrowInvalid) as error:
            said = f"{self.file(epoch)} cannot be read ({error}). Begin the job again in a new folder."
            raise DataError(said) from None
        roles, contents = columns.pop("roles"), columns.pop("contents")
        return [
            Question(**dict(zip(columns, values, strict=True)), messages=_messages(*said))
            for values, said in zip(zip(*columns.values(), strict=True), zip(roles, contents, strict=True), strict=True)
        ]


def by_priority(config: LabelConfig) -> LabelConfig:
    """Return a job whose sources are in the order of their tasks' priorities."""
    sources = sorted(config.sources, key=lambda source: config.priorities.get(str(source.task), 0))
    return replace(config, sources=sources)


_ROLES = {str(role): role for role in Role}


def _messages(roles: Sequence[str], contents: Sequence[str]) -> tuple[Message, ...]:
    return tuple(Message(_ROLES[role], content) for role, content in zip(roles, contents, strict=True))


def _question(row: ChatRow, source: int, place: int) -> Question:
    user = row.facts.get(Fact.user)
    said = [part for message in row.prompt for part in (message.role, message.content)]
    return Question(
        row=place,
        source=source,
        id=row.id,
        task=row.task,
        user=user if isinstance(user, str) else "",
        messages=row.prompt,
        digest=stable_key(row.task, *said, separator="\0")[:16],
    )
