"""Read rows of a JSONL, Parquet, CSV or TSV file one by one, with their numbers; memory does not grow with the file.

Parquet and CSV are read by pyarrow, cells as bytes, so that one broken cell spoils one row and not the file. A CSV file
has a head line; row numbers count the rows below it, in JSONL the lines.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from megatron_ads.data.bad_rows import BadRow, BadRowError
from megatron_ads.errors import DataError

MAX_CELL_BYTES = 1_000_000
MAX_ROW_BYTES = 64 << 20
"""A longer row of a CSV or JSONL file ends the reading of the file."""
_BATCH_ROWS = 1000
_SEPARATORS = {".csv": ",", ".tsv": "\t"}

Cell = str | int | float | bool | datetime | None
ReadRow = Mapping[str, Cell] | BadRowError
"""The cells asked for, by column; or why the row cannot be read."""


def read_table(file: Path, columns: Collection[str]) -> Iterator[tuple[int, ReadRow]]:
    """Yield (row number from 1, cells) of every row.

    Args:
        file: A ``.jsonl``, ``.parquet``, ``.csv`` or ``.tsv`` file.
        columns: Names of the columns that are needed; others are not read.

    Raises:
        DataError: If there is no such file, it is none of these formats, or a column is missing.
    """
    if not file.is_file():
        raise DataError(f"{file} is not a file. Check the path of this source.")
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv, ".tsv": _read_csv}
    if file.suffix not in readers:
        raise DataError(f"{file} ends in {file.suffix!r}; known: {', '.join(readers)}. Rename or convert it.")
    return readers[file.suffix](file, list(columns))


def _require_columns(file: Path, there: Collection[str], wanted: Collection[str]) -> None:
    absent = [name for name in wanted if name not in there]
    if absent:
        raise DataError(
            f"{file} has no column {absent[0]!r}; it has {', '.join(sorted(there))}. Correct the source's columns."
        )


def _read_jsonl(file: Path, columns: list[str]) -> Iterator[tuple[int, ReadRow]]:
    with file.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_ROW_BYTES + 1), b""), 1):
            if len(line) > MAX_ROW_BYTES:
                raise DataError(f"{file}, row {number}: longer than {MAX_ROW_BYTES:,} bytes. Shorten or remove it.")
            if line.strip():
                yield number, _parse_line(line, columns)


def _parse_line(line: bytes, columns: list[str]) -> ReadRow:
    try:
        parsed = json.loads(line)
    except UnicodeDecodeError as error:
        return BadRowError(BadRow.invalid_utf8, f"not UTF-8 at byte {error.start} of the line.")
    except (json.JSONDecodeError, RecursionError) as error:
        return BadRowError(BadRow.unreadable_row, f"not JSON ({error}).")
    if not isinstance(parsed, dict):
        return BadRowError(BadRow.unreadable_row, f"a {type(parsed).__name__}, not an object.")
    return _checked({name: parsed.get(name) for name in columns})


def _read_parquet(file: Path, columns: list[str]) -> Iterator[tuple[int, ReadRow]]:
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is no Parquet file ({error}).") from None
    with parquet:
        _require_columns(file, parquet.schema_arrow.names, columns)
        batches = parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
        yield from enumerate((row for batch in batches for row in _rows_of(batch)), 1)


def _read_csv(file: Path, columns: list[str]) -> Iterator[tuple[int, ReadRow]]:
    broken: dict[int, BadRowError] = {}

    def keep_going(row: Any) -> str:
        message = f"{row.actual_columns} cells; the head has {row.expected_columns}."
        broken[row.number - 1] = BadRowError(BadRow.unreadable_row, message)  # the head line is number 1
        return "skip"

    try:
        reader = pa_csv.open_csv(
            file,
            # Rows have numbers only while they are read by one thread.
            read_options=pa_csv.ReadOptions(use_threads=False, block_size=MAX_ROW_BYTES),
            parse_options=pa_csv.ParseOptions(
                delimiter=_SEPARATORS[file.suffix], newlines_in_values=True, invalid_row_handler=keep_going
            ),
            convert_options=pa_csv.ConvertOptions(
                check_utf8=False, column_types=dict.fromkeys(columns, pa.binary()), include_columns=columns
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise _csv_error(file, error) from None
    number = 0
    with reader:
        for batch in _csv_batches(file, reader):
            for row in _rows_of(batch):
                number += 1
                while number in broken:
                    yield number, broken.pop(number)
                    number += 1
                yield number, row
    yield from sorted(broken.items())


def _csv_batches(file: Path, reader: Any) -> Iterator[pa.RecordBatch]:
    try:
        yield from reader
    except pa.ArrowInvalid as error:
        raise _csv_error(file, error) from None


def _csv_error(file: Path, error: Exception) -> DataError:
    return DataError(f"{file} cannot be read as CSV ({' '.join(str(error).split())}). Correct the file or the columns.")


def _rows_of(batch: pa.RecordBatch) -> Iterator[ReadRow]:
    """Yield the rows of a batch; text is taken as bytes, so that broken text is found cell by cell."""
    lists: list[list[Any]] = []
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = column.cast(pa.large_binary())
        lists.append(column.to_pylist())
    for cells in zip(*lists, strict=True):
        yield _checked(dict(zip(batch.schema.names, cells, strict=True)))


def _checked(row: dict[str, Any]) -> ReadRow:
    """Return a row with text decoded, or what is wrong with it."""
    checked: dict[str, Cell] = {}
    for name, cell in row.items():
        if isinstance(cell, str | bytes) and len(cell) > MAX_CELL_BYTES:
            return BadRowError(
                BadRow.cell_too_long, f"{name} has {len(cell):,} bytes; {MAX_CELL_BYTES:,} are the most that is read."
            )
        try:
            checked[name] = cell.decode() if isinstance(cell, bytes) else cell
        except UnicodeDecodeError as error:
            return BadRowError(BadRow.invalid_utf8, f"{name} is not UTF-8 at byte {error.start}.")
        if isinstance(checked[name], str):
            try:
                checked[name].encode()  # type: ignore[union-attr]
            except UnicodeEncodeError:
                return BadRowError(BadRow.invalid_utf8, f"{name} holds half a surrogate pair, which is no text.")
    return checked
