"""Rows of a file that cannot be used: each has a named reason, is counted, and can be written aside with its number."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from conversion.atomic_file import write_small
from megatron_ads.data.source_files import Part, RowOrigin, Span
from megatron_ads.errors import DataError
from megatron_ads.layout import rank
from megatron_ads.observability.log import get_logger
from megatron_ads.rows import ChatRow

logger = get_logger(__name__)

_SHOWN_CHARACTERS = 200
_SMALLEST, _LARGEST = 2.0**-126, 2.0**128 - 2.0**104
"""Positive normal numbers of FP32; a GPU may take smaller ones for 0."""

Read = TypeVar("Read")
"""A row as it was read, before it is checked."""
Made = TypeVar("Made")


class BadRow(StrEnum):
    """Why a row of a file cannot be used."""

    unreadable_row = "unreadable_row"
    """The line is not JSON, or has not as many cells as there are columns."""
    cell_too_long = "cell_too_long"
    invalid_utf8 = "invalid_utf8"
    empty_text = "empty_text"
    """A field that needs text has none, or the cell is missing."""
    no_target = "no_target"
    """A conversation that does not go from a question to the assistant's answer."""
    no_preference = "no_preference"
    """No answer is rejected, the chosen one is, or they answer different prompts."""
    unknown_field = "unknown_field"
    wrong_type = "wrong_type"
    """A number where text is needed, or the other way round."""
    unknown_label = "unknown_label"
    """The label is none of the task's, or off its scale."""
    duplicate_id = "duplicate_id"
    unusable_text = "unusable_text"
    """The text cannot stand in a row of the task, such as one with a tag of the answer in it."""


class BadRowError(DataError):
    """One row of a file cannot be used, for a named reason."""

    def __init__(self, reason: BadRow, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def usable_weight(given: object, *, text: bool = False) -> float:
    """Return a row's weight, which batches hold in FP32; ``text``: given as the text of a cell.

    Raises:
        BadRowError: If it is no number, negative, or FP32 turns it into infinity or 0.
    """
    try:
        kinds = (str,) if text else (int, float)
        weight = float(given) if isinstance(given, kinds) and not isinstance(given, bool) else math.nan
    except (ValueError, OverflowError):  # OverflowError: a whole number of hundreds of digits
        weight = math.nan
    if weight == 0 or _SMALLEST <= weight <= _LARGEST:
        return weight
    message = f"weight is {given!r:.80}; it must be a number that FP32 has, 0 or from {_SMALLEST:g} to {_LARGEST:g}."
    raise BadRowError(BadRow.wrong_type, message)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be used."""

    number: int
    """Of the row in its file, from 1."""
    reason: str
    message: str
    content: str
    """A glimpse of it."""

    @classmethod
    def of(cls, number: int, error: BadRowError, content: object) -> Self:
        """Describe a row; one that cannot be read has its error as content."""
        return cls(number, str(error.reason), str(error), "").with_content(None if content is error else content)

    def with_content(self, content: object) -> Self:
        """Return it with a glimpse of what was read."""
        glimpse = repr(content)
        return replace(
            self, content=glimpse[:_SHOWN_CHARACTERS] + "..." if len(glimpse) > _SHOWN_CHARACTERS else glimpse
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RowReader(Generic[Read]):
    """How the rows of a source are read, for sources whose files can be read one by one and from the middle."""

    path: Path
    parts: list[Part]
    read: Callable[[Part, Span | None], Iterable[tuple[int, Read | BadRowError]]]
    """Gives row number and content, or why it cannot be read; of a stretch of the file, if one is given."""
    make: Callable[[RowOrigin, Read], ChatRow | None]
    """Takes a row; raises ``BadRowError`` for content that cannot be used, and returns None for a row that the recipe
    leaves out."""


@dataclass(slots=True)
class RejectedRows:
    """The rows of one source that cannot be used: the first ends the reading, or all are written aside."""

    file: Path
    aside: Path | None
    """Where they are written; None: the first one is an error."""
    records: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    """Rows that the recipe's ``values`` leave out."""

    def usable(
        self,
        parts: Iterable[Part],
        read: Callable[[Part], Iterable[tuple[int, Read | BadRowError]]],
        make: Callable[[RowOrigin, Read], Made | None],
    ) -> Iterator[Made]:
        """Yield what ``make`` returns for every row that can be used; the others are counted, with a glimpse of each.

        ``parts``, ``read`` and ``make`` are those of ``RowReader``.

        Raises:
            DataError: With the row number, for the first bad row if none are written aside.
        """
        for origin, content in ((RowOrigin(part, number), content) for part in parts for number, content in read(part)):
            try:
                if isinstance(content, BadRowError):
                    raise content
                made = make(origin, content)
            except BadRowError as error:
                self.add(origin.part, Rejected.of(origin.number, error, content))
            else:
                if made is not None:
                    yield made
                else:
                    self.left_out += 1

    def add(self, part: Part, row: Rejected) -> None:
        """Count a row.

        Raises:
            DataError: With the row number, if none are written aside.
        """
        if self.aside is None:
            raise DataError(
                f"{part.file}, row {row.number}: {row.reason}: {row.message} Correct it, or name a file with the "
                "source's setting rejected to have such rows written there."
            )
        self.counts[row.reason] += 1
        record = {"row": row.number, "reason": row.reason, "message": row.message, "content": row.content}
        self.records.append(record if part.file == self.file else {"file": part.name, **record})

    def finish(self, *, used: int) -> None:
        """Write the rejected rows aside, one JSON object a line, and log their counts, once and not on every rank.

        Raises:
            DataError: If no row was used.
        """
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items())) or "none"
        if self.aside is not None and rank() == 0:
            self.aside.parent.mkdir(parents=True, exist_ok=True)
            write_small(self.aside, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.records))
            if self.counts:
                logger.warning("%s: %d rows used; written to %s: %s", self.file, used, self.aside, counts)
        if self.left_out:
            logger.info("%s: %d rows left out by the source's setting values", self.file, self.left_out)
            counts = f"{counts}, {self.left_out} left out by the setting values"
        if not used:
            if counts == "none":
                raise DataError(f"{self.file} has no rows. Write at least one.")
            raise DataError(f"{self.file} holds no usable row; not used: {counts}. Correct them, or leave it out.")


def usable_rows(reader: RowReader[Read], *, rejected: Path | None, limit: int | None) -> list[ChatRow]:
    """Return the usable rows of a source, the first ``limit`` of them; None is all. A repeated id makes a row unusable.

    Raises:
        DataError: With the row number, for the first bad row unless ``rejected`` says where to write them; if there is
            no usable row.
    """
    first_seen: dict[str, RowOrigin] = {}

    def make_new(origin: RowOrigin, content: Read) -> ChatRow | None:
        row = reader.make(origin, content)
        if row is not None and (first := first_seen.setdefault(row.id, origin)) is not origin:
            raise repeated_id(row.id, first, origin.part)
        return row

    bad = RejectedRows(reader.path, rejected)
    rows = list(islice(bad.usable(reader.parts, lambda part: reader.read(part, None), make_new), limit))
    bad.finish(used=len(rows))
    return rows


def repeated_id(row_id: str, first: RowOrigin, part: Part) -> BadRowError:
    """Return the error for a row of ``part`` whose id an earlier row has."""
    where = "" if first.part.name == part.name else f" in {first.part.name}"
    return BadRowError(BadRow.duplicate_id, f"id {row_id!r:.80} was row {first.number}'s{where}; ids must differ.")
