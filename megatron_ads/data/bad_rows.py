"""Rows of a file that cannot be used: each has a named reason, is counted, and can be written aside with its number."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from megatron_ads.errors import DataError
from megatron_ads.observability.log import get_logger, rank
from megatron_ads.rows import ChatRow

logger = get_logger(__name__)

_SHOWN_CHARACTERS = 200
_SMALLEST, _LARGEST = 2.0**-126, 2.0**128 - 2.0**104
"""Positive normal numbers of FP32; a GPU may take smaller ones for 0."""

Read = TypeVar("Read")
"""A row as it was read, before it is checked."""


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
    unknown_field = "unknown_field"
    wrong_type = "wrong_type"
    """A number where text is needed, or the other way round."""
    unknown_label = "unknown_label"
    """The label is none of the task's, or off its scale."""
    duplicate_id = "duplicate_id"
    unusable_text = "unusable_text"
    """The text cannot stand in a row of the task, such as one with a tag of the answer in it."""


class BadRowError(DataError):
    """One row of a file cannot be used."""

    def __init__(self, reason: BadRow, message: str) -> None:
        """Keep the named reason beside the sentence."""
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


@dataclass(slots=True)
class RejectedRows:
    """The rows of one file that cannot be used: the first ends the reading, or all are written aside."""

    file: Path
    aside: Path | None
    """Where they are written; None: the first one is an error."""
    records: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[BadRow] = field(default_factory=Counter)

    def add(self, number: int, error: BadRowError, row: object) -> None:
        """Count a row; of its content no more than a glimpse is kept.

        Raises:
            DataError: If such rows are not written aside.
        """
        if self.aside is None:
            raise DataError(
                f"{self.file}, row {number}: {error.reason}: {error} Correct it, or name a file with the source's "
                "setting rejected to have such rows written there."
            ) from None
        self.counts[error.reason] += 1
        glimpse = repr(row)
        if len(glimpse) > _SHOWN_CHARACTERS:
            glimpse = glimpse[:_SHOWN_CHARACTERS] + "..."
        self.records.append({"row": number, "reason": str(error.reason), "message": str(error), "content": glimpse})

    def finish(self, *, used: int) -> None:
        """Write the rejected rows aside and log their counts, once and not on every rank.

        Raises:
            DataError: If no row was used.
        """
        if self.aside is not None and rank() == 0:
            self._write(self.aside)
            if self.counts:
                logger.warning("%s: %d rows used; written to %s: %s", self.file, used, self.aside, self._summary())
        if not used:
            raise DataError(f"{self.file} holds no usable row; not used: {self._summary()}.")

    def _write(self, out: Path) -> None:
        """Write one JSON object a rejected row; the file is there even if there is none."""
        from conversion.atomic_file import write_small  # imports torch

        out.parent.mkdir(parents=True, exist_ok=True)
        write_small(out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records))

    def _summary(self) -> str:
        """Say how many rows were rejected for which reason."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items())) or "none"


def _require_new(row_id: str, number: int, first_seen: dict[str, int]) -> None:
    """Note the number of the row that has an id.

    Raises:
        BadRowError: If an earlier row has it.
    """
    if row_id in first_seen:
        raise BadRowError(BadRow.duplicate_id, f"id {row_id!r:.80} was row {first_seen[row_id]}'s; ids must differ.")
    first_seen[row_id] = number


def usable_rows(
    file: Path,
    read: Iterable[tuple[int, Read | BadRowError]],
    make: Callable[[int, Read], ChatRow],
    *,
    rejected: Path | None,
    limit: int | None,
) -> list[ChatRow]:
    """Return the usable rows of a file, the first ``limit`` of them.

    Args:
        file: Where they come from.
        read: Row number and content, or why it cannot be read.
        make: Takes both; raises ``BadRowError`` for content that cannot be used.
        rejected: Where to write rows that cannot be used; None: the first one is an error.
        limit: None is all.

    Raises:
        DataError: With the row number, for the first bad row if none are written aside; if there is no usable row.
    """
    bad = RejectedRows(file, rejected)
    rows: list[ChatRow] = []
    first_seen: dict[str, int] = {}
    for number, content in read:
        if len(rows) == limit:
            break
        try:
            if isinstance(content, BadRowError):
                raise content
            row = make(number, content)
            _require_new(row.id, number, first_seen)
        except BadRowError as error:
            bad.add(number, error, None if isinstance(content, BadRowError) else content)
            continue
        rows.append(row)
    bad.finish(used=len(rows))
    return rows
