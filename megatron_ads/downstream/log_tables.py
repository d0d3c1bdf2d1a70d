"""One table of a folder of logs, read row by row; what is wrong with a row is told with its file and number."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from megatron_ads.data.bad_rows import BadRow, BadRowError
from megatron_ads.data.source_files import Part
from megatron_ads.data.table_files import Cells, column_types, read_table
from megatron_ads.errors import DataError

FORMS = ("parquet", "jsonl", "csv", "tsv")
_HEAD_ROWS = 100
"""Rows of a JSONL file that tell its columns."""

Made = TypeVar("Made")


def read_rows(
    folder: Path, name: str, make: Callable[[Cells], Made], columns: Sequence[str], optional: Sequence[str] = ()
) -> list[Made]:
    """Return what ``make`` makes of every row of the table ``name``.

    Args:
        folder: That holds ``name.parquet``, or the same as JSONL, CSV or TSV.
        name: Of the table.
        make: Takes the cells of a row; raises ``BadRowError`` for what cannot be used.
        columns: Those that must be there.
        optional: Those that are read where they are there.

    Raises:
        DataError: If there is no such table, a column is missing, or a row cannot be used.
    """
    found = next((file for form in FORMS if (file := folder / f"{name}.{form}").is_file()), None)
    if found is None:
        raise DataError(f"{folder} has no table {name}: {name}.parquet, or .jsonl, .csv, .tsv. Write it there.")
    part = Part(found, found.name)
    there = column_types(part, _HEAD_ROWS)
    made: list[Made] = []
    for number, cells in read_table(part, [*columns, *(column for column in optional if column in there)]):
        try:
            if isinstance(cells, BadRowError):
                raise cells
            made.append(make(cells))
        except BadRowError as error:
            raise DataError(f"{found}, row {number}: {error} Correct the row or leave it out.") from None
    if not made:
        raise DataError(f"{found} has no rows. Write at least one.")
    return made


def flag_of(cells: Cells, name: str) -> bool:
    """Return true or false, also of 0 and 1.

    Raises:
        BadRowError: If it is neither.
    """
    cell = cells.get(name)
    if isinstance(cell, bool) or (isinstance(cell, float) and cell.is_integer()):
        cell = int(cell)
    word = str(cell).strip().lower()
    if word not in ("0", "1", "true", "false"):
        raise BadRowError(BadRow.wrong_type, f"{name} is {cell!r:.40}; it must be true, false, 1 or 0.")
    return word in ("1", "true")


def seconds_of(cells: Cells) -> float | None:
    """Return how long a visit lasted; None where nothing is said.

    Raises:
        BadRowError: If it is no number, or below 0.
    """
    cell = cells.get("seconds")
    if cell is None or cell == "":
        return None
    try:
        seconds = float(str(cell))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise BadRowError(BadRow.wrong_type, f"seconds is {cell!r:.40}; it must be a number of seconds, 0 or more.")
    return seconds
