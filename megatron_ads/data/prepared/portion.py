"""One portion of a source, from its bytes to a file of tokens: what a worker process does, with bounded memory."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from conversion.atomic_file import write_small
from megatron_ads.config.data import SourceConfig
from megatron_ads.data.bad_rows import BadRowError, Rejected
from megatron_ads.data.chat import ChatTokenizer, load_tokenizer, tokenize_row
from megatron_ads.data.corpus import answers_alone
from megatron_ads.data.mixing import row_digest
from megatron_ads.data.prepared.store import PortionWriter, Reasons
from megatron_ads.data.source_files import Part, RowOrigin, Span
from megatron_ads.data.sources import divided
from megatron_ads.data.split import answer_of, in_utf8, key_digest, question_of
from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.rows import ChatRow, TokenizedRow
from megatron_ads.tasks.registry import TASKS, reasoning_required
from megatron_ads.tasks.row_checks import FaultyRow, RowFault, check_rows

REPORT_SUFFIX = ".json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """Some consecutive rows of one source."""

    name: str
    """Of the file that is written."""
    source: int
    config: SourceConfig
    part: Part | None = None
    """The file that holds the rows; None: they are given."""
    span: Span | None = None
    """Where in that file; None: all of it."""
    rows: Sequence[ChatRow] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """How every row of a corpus is tokenized, and where to."""

    folder: Path
    tokenizer: Path
    template_arguments: Mapping[str, Any]
    reasoning: bool


@dataclass(kw_only=True, slots=True)
class PortionReport:
    """What is in a portion besides its usable rows."""

    name: str
    source: int
    batches: list[int] = field(default_factory=list)
    """Rows of each record batch."""
    tokens: int = 0
    tasks: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    """Names of all facts of rows of ads tasks."""
    left_out: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    faulty: list[tuple[int, FaultyRow]] = field(default_factory=list)
    """Each with the number of the row in its file."""
    refused: dict[int, str] = field(default_factory=dict)
    """Rows that the chat template refuses, by place in the portion."""
    warnings: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Usable rows."""
        return sum(self.batches)

    @classmethod
    def read(cls, file: Path) -> Self | None:
        """Return the report of a portion that is complete."""
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        stored["rejected"] = [Rejected(**each) for each in stored["rejected"]]
        stored["faulty"] = [
            (number, FaultyRow(**each | {"fault": RowFault(each["fault"])})) for number, each in stored["faulty"]
        ]
        stored["refused"] = {int(place): message for place, message in stored["refused"].items()}
        return cls(**stored)


def make_portion(portion: Portion, advance: Any, *, manner: Manner) -> PortionReport:
    """Write the rows of a portion, then its report, which says that they are complete; what is there already is kept.

    Raises:
        DataError: If a file cannot be read, or, without a file for rejected rows, some row cannot be used.
    """
    report_file = manner.folder / f"{portion.name}{REPORT_SUFFIX}"
    if (found := PortionReport.read(report_file)) is not None:
        return found
    report = PortionReport(name=portion.name, source=portion.source)
    tokenizer = _tokenizer(manner.tokenizer, json.dumps(dict(manner.template_arguments)))
    writer = PortionWriter(manner.folder / portion.name)
    try:
        with collected_warnings(report.warnings):
            for number, row in _rows(portion, report):
                _add(writer, report, number, row, tokenizer, reasoning=manner.reasoning)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    report.batches = writer.batches
    write_small(report_file, json.dumps(asdict(report)))
    advance(report.rows)
    return report


@cache
def _tokenizer(folder: Path, template_arguments: str) -> ChatTokenizer:
    with collected_warnings([]):  # whoever opens the corpus tells of the template
        return load_tokenizer(folder, json.loads(template_arguments))


def _rows(portion: Portion, report: PortionReport) -> Iterator[tuple[int, ChatRow]]:
    """Yield the rows that can be read, each with its number in its file; the others go into the report."""
    if portion.part is None:
        yield from enumerate(portion.rows, 1)
        return
    files = divided(portion.config)
    assert files is not None, "only such sources have portions with a part"
    for number, content in files.read(portion.part, portion.span):
        try:
            if isinstance(content, BadRowError):
                raise content
            row = files.make(RowOrigin(portion.part, number), content)
        except BadRowError as error:
            report.rejected.append(Rejected.of(number, error, content))
            if portion.config.rejected is None:  # the first one ends the reading
                return
        else:
            report.left_out += row is None
            if row is not None:
                yield number, row


def _add(
    writer: PortionWriter,
    report: PortionReport,
    number: int,
    row: ChatRow,
    tokenizer: ChatTokenizer,
    *,
    reasoning: bool,
) -> None:
    checked = check_rows([row])
    if checked.faulty:
        report.faulty.append((number, checked.faulty[0]))
        return
    (row,) = checked.rows
    if row.task not in report.tasks:
        report.tasks.append(row.task)
    if not reasoning:
        (row,) = answers_alone([row])
    if row.task in TASKS:
        report.facts += [str(fact) for fact in row.facts if fact not in report.facts]
    try:
        tokenized = tokenize_row(row, tokenizer)
    except DataError as error:  # it ends the job only if the row takes part
        report.refused[writer.rows] = str(error)
        tokenized = TokenizedRow(row.id, row.task, np.empty(0, np.int32), np.empty(0, np.float32))
    question = question_of(row)
    writer.append(
        tokenized.tokens,
        prompt=len(tokenized.tokens) - np.count_nonzero(tokenized.loss_weights),
        weight=row.weight,
        id=in_utf8(row.id),
        declared=in_utf8(row.group),
        task=report.tasks.index(row.task),
        number=number,
        reasons=_reasons(row),
        group=key_digest(same_name(row.group) or question),
        question=key_digest(question),
        answer=key_digest(answer_of(row)),
        content=row_digest(tokenized),
        time=float("nan") if row.time is None else row.time,
    )
    report.tokens += len(tokenized.tokens)


def _reasons(row: ChatRow) -> Reasons:
    if row.task not in TASKS or not TASKS[row.task].reasons:
        return Reasons.not_asked
    return Reasons.given if reasoning_required(row) else Reasons.missing


@contextmanager
def collected_warnings(warnings: list[str]) -> Iterator[None]:
    """Keep the project's warnings, each once, in place of logging them: whoever opens the corpus does that."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (message := record.getMessage()) not in warnings:
                warnings.append(message)

    logger = logging.getLogger("megatron_ads")
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [Collect(logging.WARNING)], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before
