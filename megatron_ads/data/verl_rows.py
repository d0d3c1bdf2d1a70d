"""Read files that were made for verl, Parquet or JSONL, as they are; columns that are not verl's are not read."""

from collections.abc import Iterator
from pathlib import Path

from megatron_ads.data.bad_rows import BadRowError, RowReader, usable_rows
from megatron_ads.data.jsonl import parse_row
from megatron_ads.data.source_files import JSON_LINES, Part, RowOrigin, Span, parts_of
from megatron_ads.data.table_files import Cells, ReadRow, column_types, read_table
from megatron_ads.data.verl_form import VERL_FIELDS, from_verl
from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.text_rows import facts_of_text_row


def verl_rows(path: Path, *, limit: int | None = None, rejected: Path | None = None) -> list[ChatRow]:
    """Return the rows of a file, or of the files of a folder or glob, the first ``limit`` of them.

    With ``rejected``, rows that cannot be used are counted and written to that file.

    Raises:
        DataError: If a file cannot be read or has no column ``prompt``; with the row number, for the first row that
            cannot be used, unless ``rejected`` says where to write it; if there is no usable row.
    """
    return usable_rows(verl_reader(path), rejected=rejected, limit=limit)


def verl_reader(path: Path) -> RowReader[Cells]:
    """Return how the rows of ``verl_rows`` are read."""

    def make(origin: RowOrigin, cells: Cells) -> ChatRow:
        fields = from_verl(cells, needs_target=False)
        return facts_of_text_row(parse_row(fields, default_id=origin.row_id))

    return RowReader(path=path, parts=parts_of(path), read=_read, make=make)


def _read(part: Part, span: Span | None) -> Iterator[tuple[int, ReadRow]]:
    """Yield the fields that a file has; a missing one and null are the same."""
    there = VERL_FIELDS if part.form in JSON_LINES else column_types(part, 0)
    if "prompt" not in there:
        raise DataError(f"{part.file} has no column 'prompt'; kind verl reads {', '.join(VERL_FIELDS)}.")
    for number, row in read_table(part, [name for name in VERL_FIELDS if name in there], span):
        if isinstance(row, BadRowError):
            yield number, row
        else:
            yield number, {name: cell for name, cell in row.items() if cell is not None}
