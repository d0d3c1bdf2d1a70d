"""A team's own logs as rows: columns of any names, mapped to the fields of a task, every row checked.

Fields of a task are declared here; the columns that hold them, in the recipe. A row that cannot be used has a named
reason and its number; it ends the reading, or is counted and written aside where the recipe names a file for that.

Rows of a JSONL, Parquet, CSV or TSV file are read one by one; memory does not grow with the file. Parquet and CSV are
read by pyarrow, cells as bytes, so that one broken cell spoils one row and not the file. A CSV file has a head line;
row numbers count the rows below it, in JSONL the lines.
"""

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from megatron_ads.config.data import AdsTask
from megatron_ads.data.bad_rows import BadRow, BadRowError, usable_rows, usable_weight
from megatron_ads.data.jsonl import read_lines
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.rows import ChatRow, Message, Role
from megatron_ads.tasks import relevance
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Flag, Label
from megatron_ads.tasks.text_rows import facts_of_text_row

MAX_CELL_BYTES = 1_000_000
MAX_ROW_BYTES = 64 << 20
"""A longer row of a CSV file ends the reading of the file; one of a JSONL file cannot be used."""
_BATCH_ROWS = 1000
_SEPARATORS = {".csv": ",", ".tsv": "\t"}

Cell = str | int | float | bool | datetime | None
Cells = Mapping[str, Cell]
"""By field; as they are read, by column."""
ReadRow = Cells | BadRowError
"""The cells asked for, or why the row cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What rows of a task are made from."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    make: Callable[[str, Cells], ChatRow]
    """From a row's id and its fields."""


def table_rows(
    file: Path,
    *,
    columns: Mapping[str, str],
    task: AdsTask | None = None,
    rejected: Path | None = None,
    limit: int | None = None,
) -> list[ChatRow]:
    """Return the usable rows of a file, the first ``limit`` of them.

    Args:
        file: A JSONL, Parquet, CSV or TSV file.
        columns: Field -> the column that holds it.
        task: What the rows ask for; None: they have a prompt and a target already.
        rejected: Where to write rows that cannot be used; None: the first one is an error.

    Raises:
        ConfigError: If a field is unknown or missing, or rows of the task cannot be made from a table.
        DataError: If the file cannot be read or holds no usable row; with the row number, for the first bad row.
    """
    if task not in FORMS:
        known = ", ".join(str(name) for name in FORMS if name is not None)
        raise ConfigError(f"a table cannot be read as rows of {task}; known: {known}, or none for prompt and target.")
    form = FORMS[task]
    check_columns(columns, required=form.required, optional=form.optional)

    def make(number: int, by_column: Cells) -> ChatRow:
        cells = {name: by_column[column] for name, column in columns.items()}
        for name in form.required:
            text_of(cells, name)
        row_id = optional_text(cells, "id") or f"{file.name}-{number}"
        try:
            return form.make(row_id, cells)
        except BadRowError:
            raise
        except DataError as error:  # from the task: the text holds what the answer's form needs for itself
            raise BadRowError(BadRow.unusable_text, str(error)) from None

    read = read_table(file, list(dict.fromkeys(columns.values())))
    return usable_rows(file, read, make, rejected=rejected, limit=limit)


def check_columns(columns: Mapping[str, str], *, required: Sequence[str], optional: Sequence[str]) -> None:
    """Refuse a mapping that names an unknown field, or leaves a required one out.

    Raises:
        ConfigError: Naming the field.
    """
    known = [*required, *optional]
    for name in columns:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"columns names the field {name!r}; known: {', '.join(known)}.{hint}")
    if missing := [name for name in required if name not in columns]:
        raise ConfigError(f"columns does not say which column holds {', '.join(missing)}. Add it: {missing[0]}: NAME.")


def text_of(cells: Cells, name: str) -> str:
    """Return a cell's text; numbers are written out.

    Raises:
        BadRowError: If there is none.
    """
    cell = cells.get(name)
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return str(cell)
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise BadRowError(BadRow.empty_text, f"{name} is {cell!r}; it must be text that is not empty.")
    if not isinstance(cell, str):
        raise BadRowError(BadRow.wrong_type, f"{name} is {cell!r:.80}; it must be text.")
    return cell.strip()


def optional_text(cells: Cells, name: str) -> str:
    """Return a cell's text, empty where there is none."""
    cell = cells.get(name)
    return "" if cell is None or cell == "" else text_of(cells, name)


def _pair_row(row_id: str, cells: Cells) -> ChatRow:
    ad = Ad(text_of(cells, "title"), optional_text(cells, "description"), optional_text(cells, "seller"))
    flags = {name: _one_of(cells, name, tuple(Flag)) for name in ("location", "quality") if optional_text(cells, name)}
    label = _one_of(cells, "label", tuple(Label))
    query, reasoning = text_of(cells, "query"), optional_text(cells, "reasoning")
    return relevance.chat_row(row_id, query, ad, Label(label), reasoning, **{k: Flag(v) for k, v in flags.items()})


def _one_of(cells: Cells, name: str, known: tuple[str, ...]) -> str:
    """Return the label that a cell holds, whatever its capitals."""
    given = text_of(cells, name)
    found = next((str(label) for label in known if label.lower() == given.lower()), None)
    if found is None:
        raise BadRowError(BadRow.unknown_label, f"{name} is {given!r:.80}; known: {', '.join(known)}.")
    return found


def _chat_row(row_id: str, cells: Cells) -> ChatRow:
    given = optional_text(cells, "weight")
    prompt, target = text_of(cells, "prompt"), text_of(cells, "target")
    row = ChatRow(
        id=row_id,
        task=optional_text(cells, "task") or "chat",
        messages=(Message(Role.user, prompt), Message(Role.assistant, target)),
        weight=usable_weight(given or "1", text=True),
        group=optional_text(cells, "group"),
        label=optional_text(cells, "label") or None,
    )
    return facts_of_text_row(row)


FORMS: dict[AdsTask | None, Form] = {
    None: Form(
        required=("prompt", "target"), optional=("id", "task", "group", "label", "weight"), make=_chat_row
    ),
    AdsTask.query_ad_relevance: Form(
        required=("query", "title", "label"),
        optional=("id", "description", "seller", "reasoning", "location", "quality"),
        make=_pair_row,
    ),
}  # fmt: skip
"""What can be read from a table with one row an example."""


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


def _read_jsonl(file: Path, columns: list[str]) -> Iterator[tuple[int, ReadRow]]:
    for number, row in read_lines(file, MAX_ROW_BYTES):
        yield number, row if isinstance(row, BadRowError) else _decoded({name: row.get(name) for name in columns})


def _read_parquet(file: Path, columns: list[str]) -> Iterator[tuple[int, ReadRow]]:
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is no Parquet file ({error}).") from None
    with parquet:
        there = parquet.schema_arrow.names
        if absent := [name for name in columns if name not in there]:
            has = ", ".join(sorted(there))
            raise DataError(f"{file} has no column {absent[0]!r}; it has {has}. Correct the source's columns.")
        batches = parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
        yield from enumerate((row for batch in batches for row in _rows_of(batch)), 1)


def _read_csv(file: Path, columns: list[str]) -> Iterator[tuple[int, ReadRow]]:
    broken: dict[int, BadRowError] = {}

    def keep_going(row: Any) -> str:
        message = f"{row.actual_columns} cells; the head has {row.expected_columns}."
        broken[row.number - 1] = BadRowError(BadRow.unreadable_row, message)  # the head line is number 1
        return "skip"

    number = 0
    try:
        with pa_csv.open_csv(
            file,
            # Rows have numbers only while they are read by one thread.
            pa_csv.ReadOptions(use_threads=False, block_size=MAX_ROW_BYTES),
            pa_csv.ParseOptions(
                delimiter=_SEPARATORS[file.suffix], newlines_in_values=True, invalid_row_handler=keep_going
            ),
            pa_csv.ConvertOptions(
                check_utf8=False, column_types=dict.fromkeys(columns, pa.binary()), include_columns=columns
            ),
        ) as batches:
            for row in (row for batch in batches for row in _rows_of(batch)):
                number += 1
                while number in broken:
                    yield number, broken.pop(number)
                    number += 1
                yield number, row
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file} cannot be read as CSV ({reason}). Correct the file or the columns.") from None
    yield from sorted(broken.items())


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
        yield _decoded(dict(zip(batch.schema.names, cells, strict=True)))


def _decoded(row: dict[str, Any]) -> ReadRow:
    """Return a row with its text decoded, or what is wrong with it."""
    for name, cell in row.items():
        if not isinstance(cell, str | bytes):
            continue
        if len(cell) > MAX_CELL_BYTES:
            message = f"{name} has {len(cell):,} bytes; {MAX_CELL_BYTES:,} are the most that is read."
            return BadRowError(BadRow.cell_too_long, message)
        try:
            if isinstance(cell, bytes):
                row[name] = cell.decode()
            else:
                cell.encode()  # JSON can hold half a surrogate pair
        except UnicodeDecodeError as error:
            return BadRowError(BadRow.invalid_utf8, f"{name} is not UTF-8 at byte {error.start}.")
        except UnicodeEncodeError:
            return BadRowError(BadRow.invalid_utf8, f"{name} holds half a surrogate pair, which is no text.")
    return row
