"""Rows of a JSONL, Parquet, CSV or TSV file as plain cells, one by one; memory does not grow with the file.

Parquet and CSV are read by pyarrow, text as bytes, so that one broken cell spoils one row and not the file. A CSV file
has a head line; row numbers count the rows below it, in JSONL the lines. NaN is a missing cell in every format.
"""

import csv
import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from megatron_ads.data.bad_rows import BadRow, BadRowError
from megatron_ads.data.jsonl import read_lines
from megatron_ads.data.source_files import JSON_LINES, TABLES, Part, Span, form_of, open_text, require_columns
from megatron_ads.errors import DataError, one_line
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)

MAX_CELL_BYTES = 1_000_000
MAX_ROW_BYTES = 64 << 20
"""A longer row of a CSV file ends the reading of the file; one of a JSONL file cannot be used."""
_BATCH_ROWS = 1000
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_OTHER_SEPARATORS = ";,\t|"
_MANY_LINES = 20

Cell = str | int | float | bool | Decimal | date | UUID | list[Any] | dict[str, Any] | None
"""``date`` includes ``datetime``."""
Cells = Mapping[str, Cell]
"""By field; as they are read, by column."""
ReadRow = Cells | BadRowError
"""The cells asked for, or why the row cannot be read."""


def read_table(part: Part, columns: Collection[str], span: Span | None = None) -> Iterator[tuple[int, ReadRow]]:
    """Yield (row number from 1, cells) of every row.

    Args:
        part: A file; its suffix says its format.
        columns: Names of the columns that are needed; others are not read.
        span: Which lines of an uncompressed JSONL file; None: all rows.

    Raises:
        DataError: If the file is of no known format or cannot be read, or a column is missing or there twice.
    """
    _require_table(part)
    stored = [name for name in columns if name not in part.partition]
    read = _read_csv if part.form in _SEPARATORS else _read_parquet
    if part.form in JSON_LINES:
        read = partial(_read_jsonl, span=span)
    if len(stored) == len(columns):
        yield from read(part.file, stored)
        return
    for number, row in read(part.file, stored):
        yield number, row if isinstance(row, BadRowError) else {**part.partition, **row}


def column_types(part: Part, rows: int) -> dict[str, str]:
    """Return the columns of a file with their types: Parquet's own, elsewhere ``text`` or what the first rows hold.

    Raises:
        DataError: If the file is of no known format or cannot be read.
    """
    _require_table(part)
    if part.form in JSON_LINES:
        lines = [row for _, row in islice(read_lines(part.file), rows) if not isinstance(row, BadRowError)]
        found = {name: type(cell).__name__ for row in lines for name, cell in row.items() if cell is not None}
        stored = {name: found.get(name, "null") for row in lines for name in row}
    elif part.form in _SEPARATORS:
        stored = dict.fromkeys(_csv_head(part.file, [])[0], "text")
    else:
        with _parquet(part.file) as parquet:
            schema = parquet.schema_arrow
        stored = {name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)}
    return stored | dict.fromkeys(part.partition, "partition")


def _require_table(part: Part) -> None:
    if part.form not in TABLES:
        raise DataError(f"{part.file} ends in {part.file.suffix!r}; known: {', '.join(TABLES)}. Rename or convert it.")


def _read_jsonl(file: Path, columns: list[str], span: Span | None) -> Iterator[tuple[int, ReadRow]]:
    for number, row in read_lines(file, MAX_ROW_BYTES, span):
        yield number, row if isinstance(row, BadRowError) else _decoded({name: row.get(name) for name in columns})


def _parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, coerce_int96_timestamp_unit="us")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file} is no Parquet file ({one_line(error)}).") from None


def _read_parquet(file: Path, columns: list[str]) -> Iterator[tuple[int, ReadRow]]:
    with _parquet(file) as parquet:
        require_columns(file, parquet.schema_arrow.names, columns)
        try:
            batches = parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
            yield from enumerate((row for batch in batches for row in _rows_of(batch)), 1)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read ({one_line(error)}). Copy or write it again.") from None


def _csv_head(file: Path, columns: Sequence[str]) -> tuple[list[str], str, int]:
    """Return the names in the head line of a file, what separates them, and how many lines stand before it.

    The separator is that of the suffix if with it the head has all ``columns``, or else the one that suits best.
    """
    usual, lines, stream = _SEPARATORS[form_of(file)], 0, open_text(file)
    try:
        with io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="") as text:
            first = text.readline(MAX_CELL_BYTES)
            while first and (not first.strip() or first.startswith("sep=")):  # Excel writes sep=;
                usual = first.strip()[4:] or usual
                lines, first = lines + 1, text.readline(MAX_CELL_BYTES)
            rest = list(islice(text, 100)) if first.count('"') % 2 else []
        heads = {mark: next(csv.reader([first, *rest], delimiter=mark), []) for mark in (usual, *_OTHER_SEPARATORS)}
    except (OSError, csv.Error, TypeError, ValueError) as error:
        raise DataError(
            f"{file} cannot be read as CSV ({one_line(error)}). Correct the file or copy it again."
        ) from None
    if not heads[usual]:
        raise DataError(f"{file} cannot be read as CSV (it has no head line). Write the columns' names into its first.")
    fits = {mark: names for mark, names in heads.items() if set(columns) <= set(names)} or heads
    mark = usual if columns and usual in fits and fits is not heads else max(fits, key=lambda mark: len(fits[mark]))
    return heads[mark], mark, lines


def _read_csv(file: Path, columns: list[str]) -> Iterator[tuple[int, ReadRow]]:
    names, mark, lines_before = _csv_head(file, columns)
    require_columns(file, names, columns)
    if mark != _SEPARATORS[form_of(file)]:
        logger.info("%s: columns are separated by %r", file, mark)
    broken: dict[int, BadRowError] = {}

    def keep_going(row: Any) -> str:
        message = f"{row.actual_columns} cells; the head has {row.expected_columns}."
        broken[row.number - 1 - lines_before] = BadRowError(BadRow.unreadable_row, message)  # the head is number 1
        return "skip"

    # Read as Latin-1, in which every byte is a letter: pyarrow tells of broken rows only what it can decode.
    stored = [name.encode().decode("latin-1") for name in columns]
    number = 0
    try:
        with (
            open_text(file) as stream,
            pa_csv.open_csv(
                stream,
                # Rows have numbers only while they are read by one thread.
                pa_csv.ReadOptions(
                    use_threads=False, block_size=MAX_ROW_BYTES, skip_rows=lines_before, encoding="latin-1"
                ),
                pa_csv.ParseOptions(delimiter=mark, newlines_in_values=True, invalid_row_handler=keep_going),
                pa_csv.ConvertOptions(column_types=dict.fromkeys(stored, pa.string()), include_columns=stored),
            ) as batches,
        ):
            for cells in (row for batch in batches for row in zip(*(each.to_pylist() for each in batch), strict=True)):
                number += 1
                while number in broken:
                    yield number, broken.pop(number)
                    number += 1
                read = (cell if cell.isascii() else cell.encode("latin-1") for cell in cells)
                row = _decoded(dict(zip(columns, read, strict=True)))
                _warn_of_quotes(file, number, row)
                yield number, row
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as CSV ({one_line(error)}). Correct the file or the columns.") from None
    yield from sorted(broken.items())


def _warn_of_quotes(file: Path, number: int, row: ReadRow) -> None:
    """Say which cell may hold several rows: an inch sign opens a quote that only a later one closes."""
    for name, cell in {} if isinstance(row, BadRowError) else row.items():
        if isinstance(cell, str) and cell.count("\n") > _MANY_LINES:
            _warn_once(
                f"{file}, row {number}: {name} has {cell.count(chr(10)) + 1} lines. Is a quote sign not closed there?"
            )


@cache
def _warn_once(message: str) -> None:
    """Log a warning however often the row is read: a preview reads a table twice."""
    logger.warning(message)


def _rows_of(batch: pa.RecordBatch) -> Iterator[ReadRow]:
    """Yield the rows of a batch."""
    for cells in zip(*map(_plain, batch.columns), strict=True):
        yield _decoded(dict(zip(batch.schema.names, cells, strict=True)))


def _plain(column: pa.Array) -> list[Any]:
    """Return a column's cells: text as bytes, so that broken text is found cell by cell; times in UTC, to 1 us."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.large_binary())
    elif pa.types.is_timestamp(kind):  # nanoseconds are no Python time, and not every machine knows every zone
        unit = "us" if kind.unit == "ns" else kind.unit
        column = column.cast(pa.timestamp(unit, kind.tz and "UTC"), safe=False)
    try:
        cells: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):  # text that is none inside a list, years beyond 9999
        cells = list(map(_plain_cell, column))
    return cells


def _plain_cell(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return BadRowError(BadRow.invalid_utf8, f"is not UTF-8 at byte {error.start}.")
    except (ValueError, OverflowError) as error:
        return BadRowError(BadRow.wrong_type, f"cannot be read ({error}).")


def _decoded(row: dict[str, Any]) -> ReadRow:
    """Return a row with its text decoded and NaN as missing, or what is wrong with it."""
    for name, cell in row.items():
        if isinstance(cell, str) and cell.isascii() and len(cell) <= MAX_CELL_BYTES:  # nearly every cell
            continue
        if isinstance(cell, float | Decimal) and math.isnan(cell):
            row[name] = None
        if isinstance(cell, BadRowError):
            return BadRowError(cell.reason, f"{name} {cell}")
        for text in cell if isinstance(cell, list) else (cell,):
            if not isinstance(text, str | bytes):
                continue
            if len(text) > MAX_CELL_BYTES:
                message = f"{name} has {len(text):,} bytes; {MAX_CELL_BYTES:,} are the most that is read."
                return BadRowError(BadRow.cell_too_long, message)
            try:
                if text is cell and isinstance(text, bytes):
                    row[name] = text.decode()
                elif isinstance(text, str):
                    text.encode()  # JSON can hold half a surrogate pair
            except UnicodeDecodeError as error:
                return BadRowError(BadRow.invalid_utf8, f"{name} is not UTF-8 at byte {error.start}.")
            except UnicodeEncodeError:
                return BadRowError(BadRow.invalid_utf8, f"{name} holds half a surrogate pair, which is no text.")
    return row
