"""Which rows of a prepared corpus a job trains on and which are held out: arrays of row numbers, memory-mapped.

They follow from the corpus and a few settings (seed, validation rows, sequence length), take seconds for a million rows
and are kept in a folder of the corpus, so that the ranks of a job share one copy.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from conversion.atomic_file import write_small
from megatron_ads.config.data import DataConfig, SourceConfig, SplitBy
from megatron_ads.data.corpus import (
    TAKES_PART,
    LeftOut,
    codes_left_out,
    count_left_out,
    none_left,
    report_few_groups,
    report_lost,
)
from megatron_ads.data.mixing import WeightedRows, content_of
from megatron_ads.data.prepared.corpus_record import CorpusRecord
from megatron_ads.data.prepared.exclusive import refused_writes_named
from megatron_ads.data.prepared.store import RowFiles, StoredRows
from megatron_ads.data.sources import describe_source
from megatron_ads.data.split import Numbers, NumberSplit, RowKeys, hold_out_groups, hold_out_latest
from megatron_ads.errors import DataError

_RECORD = "selection.json"
_HELD_OUT = "held_out.npy"


@dataclass(kw_only=True, slots=True)
class TrainingPart:
    """Rows of a source, or of one task of it, that samples are drawn from."""

    source: int
    task: str | None
    """Whose share adapts; None: all tasks of the source."""
    of_rows: int
    """Rows of all tasks of the source."""
    content: str
    """Digest of the rows and their order."""
    file: str


@dataclass(kw_only=True, slots=True)
class Selection:
    """What a job takes from a corpus; the arrays are files next to this record."""

    parts: list[TrainingPart]
    left_out: dict[str, int]
    """Training rows that take no part, by reason."""
    held_out_left_out: dict[str, int]
    lost_tasks: list[str]
    """Those of which everything is held out."""
    held_out_rows: int
    """Before some of them are left out."""
    held_out_groups: int
    training_groups: int
    """Groups such as queries; both 0 if rows are held out by time."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a complete selection."""
        stored = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        stored["parts"] = [TrainingPart(**each) for each in stored["parts"]]
        return cls(**stored)


@dataclass(frozen=True, slots=True)
class PreparedData:
    """The rows of a job, read as they are needed."""

    training: list[WeightedRows]
    left_out: Counter[LeftOut]
    held_out: StoredRows
    held_out_left_out: Counter[LeftOut]


def select(corpus: Path, data: DataConfig, *, by_task: bool, evaluate: bool) -> Path:
    """Return the folder of a selection from ``corpus``; make it if it is not there.

    Args:
        by_task: Divide sources by task, in proportion to their rows, so that the tasks' shares can adapt.
        evaluate: Whether held-out rows are needed; their number is the same without.

    Raises:
        DataError: If all rows of a source are held out, or none of the others fits, or a row that takes part is
            refused by the chat template.
    """
    settings = {name: getattr(data, name) for name in ("seed", "validation_rows", "validation_rows_per_group")}
    settings |= {"seq_length": data.seq_length, "split_by": data.split_by, "evaluate": evaluate}
    settings["by_task"] = [by_task and not source.keep_share for source in data.sources]
    folder = corpus / f"selection-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        with refused_writes_named(corpus.parent):
            partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=corpus))
        try:
            with refused_writes_named(corpus.parent):
                _write(_Rows(corpus, data), partial, by_task=settings["by_task"], evaluate=evaluate)
            with suppress(OSError):  # another process was first
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def open_selection(folder: Path, data: DataConfig) -> PreparedData:
    """Open what ``select`` made; nothing is read before a row is asked for, and no memory grows with the rows."""
    found, record = Selection.read(folder), CorpusRecord.read(folder.parent)
    files = RowFiles(folder.parent, record.portions)

    def rows(name: str) -> StoredRows:
        return StoredRows(files, np.load(folder / name, mmap_mode="r"))

    training = [_weighted(part, data.sources[part.source], rows(part.file)) for part in found.parts]
    report_lost(set(found.lost_tasks), set())
    report_few_groups(found.held_out_rows, found.held_out_groups, found.training_groups)
    return PreparedData(training, _counter(found.left_out), rows(_HELD_OUT), _counter(found.held_out_left_out))


def _weighted(part: TrainingPart, source: SourceConfig, rows: StoredRows) -> WeightedRows:
    name = describe_source(source)
    if part.task is None:
        return WeightedRows(rows, source.weight, name, known_content=part.content)
    weight = source.weight * len(rows) / part.of_rows
    return WeightedRows(rows, weight, f"{name}, {part.task}", adaptive_task=part.task, known_content=part.content)


def _counter(counts: Mapping[str, int]) -> Counter[LeftOut]:
    return Counter({LeftOut(reason): count for reason, count in counts.items()})


class _Rows:
    """The columns of a corpus that decide which rows take part."""

    def __init__(self, corpus: Path, data: DataConfig) -> None:
        record = CorpusRecord.read(corpus)
        self.files, self.refused, self.data = RowFiles(corpus, record.portions), record.refused, data
        self.usable = record.usable(corpus)
        sizes = [(report.source, report.rows) for report in record.portions]
        self.sources = np.repeat([source for source, _ in sizes], [rows for _, rows in sizes])
        self.tasks = np.array(self.files.tasks(), dtype=object)
        lengths = self.files.lengths()
        self.codes = codes_left_out(
            self.files.numbers("weight"),
            lengths - self.files.numbers("prompt"),
            lengths - 1,
            seq_length=data.seq_length,
        )

    def split(self) -> NumberSplit:
        """Return the numbers of the rows on both sides."""
        data, usable = self.data, self.usable
        ids, declared = self.files.texts("id"), self.files.texts("declared")
        keys = RowKeys(
            ids=[ids[number] for number in usable.tolist()],
            declared=[declared[number] for number in usable.tolist()],
            groups=self.files.keys("group")[usable],
            questions=self.files.keys("question")[usable],
            tasks=self.tasks[usable].tolist(),
            times=self.files.numbers("time")[usable],
        )
        if data.split_by is SplitBy.time:
            split = hold_out_latest(keys, data.validation_rows, seed=data.seed)
        else:
            per_group = data.validation_rows_per_group
            split = hold_out_groups(keys, data.validation_rows, seed=data.seed, max_per_group=per_group)
        return NumberSplit(usable[split.training], usable[split.validation])

    def taking_part(self, rows: Numbers, name: str) -> tuple[Numbers, Counter[LeftOut]]:
        """Return those of ``rows`` that take part, and why the others do not.

        Raises:
            DataError: If none does, or the chat template refuses one.
        """
        if self.refused and (refused := next((row for row in rows.tolist() if row in self.refused), None)) is not None:
            raise DataError(self.refused[refused])
        left_out = count_left_out(self.codes[rows])
        kept = rows[self.codes[rows] == TAKES_PART]
        if not len(kept):
            raise none_left(f"{len(rows)} {name}", left_out, self.data.seq_length)
        return kept, left_out


def _write(rows: _Rows, folder: Path, *, by_task: Sequence[bool], evaluate: bool) -> None:
    split = rows.split()
    contents = rows.files.keys("content")
    left_out: Counter[LeftOut] = Counter()
    parts: list[TrainingPart] = []
    for index, source in enumerate(rows.data.sources):
        name = describe_source(source)
        of_source = split.training[rows.sources[split.training] == index]
        if not len(of_source):
            raise DataError(
                f"All rows of {name} are held out, or share a group such as a query with held-out rows. Lower "
                "data.validation_rows, or add rows."
            )
        kept, without = rows.taking_part(of_source, f"training rows of {name}")
        left_out += without
        of_tasks: dict[str | None, Numbers] = {None: kept}
        if by_task[index]:
            of_tasks = {task: kept[rows.tasks[kept] == task] for task in sorted(set(rows.tasks[kept].tolist()))}
        for task, numbers in of_tasks.items():
            file, content = f"training-{len(parts)}.npy", content_of(contents[numbers].tolist())
            _save(folder / file, numbers)
            parts.append(TrainingPart(source=index, task=task, of_rows=len(kept), content=content, file=file))
    held_out, without_held_out = split.validation, Counter[LeftOut]()
    if evaluate:
        held_out, without_held_out = rows.taking_part(held_out, "held-out rows")
    _save(folder / _HELD_OUT, held_out)
    groups, by_group = rows.files.keys("group"), rows.data.split_by is SplitBy.group
    trained, all_tasks = (set(rows.tasks[numbers].tolist()) for numbers in (split.training, rows.usable))
    record = Selection(
        parts=parts,
        left_out={str(reason): count for reason, count in left_out.items()},
        held_out_left_out={str(reason): count for reason, count in without_held_out.items()},
        lost_tasks=sorted(all_tasks - trained),
        held_out_rows=len(split.validation),
        held_out_groups=len(np.unique(groups[split.validation])) if by_group else 0,
        training_groups=len(np.unique(groups[split.training])) if by_group else 0,
    )
    write_small(folder / _RECORD, json.dumps(asdict(record)))


def _save(file: Path, numbers: Numbers) -> None:
    with file.open("wb") as opened:
        np.save(opened, numbers)
        opened.flush()
        os.fsync(opened.fileno())
