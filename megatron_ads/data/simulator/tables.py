"""Write large tables piece by piece, as Parquet or JSON lines; memory does not grow with the table."""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


class TableFormat(StrEnum):
    """How tables are written."""

    parquet = "parquet"
    jsonl = "jsonl"


class TableWriter(Protocol):
    """A file that a table is appended to. It is complete, and on disk, once it is closed."""

    def append(self, table: pa.Table) -> None:
        """Write the rows of ``table`` after those written before; the columns are always the same."""

    def close(self) -> None:
        """Finish the file and flush it to disk."""


class ParquetTable:
    """A Parquet file, one row group a piece."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", compression_level=1)

    def append(self, table: pa.Table) -> None:
        """Write one row group."""
        self._writer.write_table(table)

    def close(self) -> None:
        """Write the footer and flush."""
        self._writer.close()
        flush_file(self._path)


class JsonlTable:
    """One JSON object a line."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._file = path.open("wb")

    def append(self, table: pa.Table) -> None:
        """Write one line a row."""
        for batch in table.to_batches(max_chunksize=20_000):
            self._file.write(_json_lines(batch))

    def close(self) -> None:
        """Flush."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _json_lines(batch: pa.RecordBatch) -> bytes:
    """Return the rows of a batch as text, joined column by column: row by row it takes ten times as long."""
    pieces: list[Any] = []
    for number, name in enumerate(batch.schema.names):
        pieces += [f"{', ' if number else '{'}{json.dumps(name)}: ", _as_json(batch.column(number))]
    lines = pc.binary_join_element_wise(*pieces, "}\n", "")
    return "".join(lines.to_pylist()).encode()


def _as_json(column: pa.Array) -> pa.Array:
    """Return the values of a column as JSON texts."""
    if pa.types.is_boolean(column.type):
        texts = pc.if_else(column, "true", "false")
    elif pa.types.is_integer(column.type):
        texts = column.cast(pa.string())
    elif pa.types.is_floating(column.type):
        texts = column.cast(pa.float64()).cast(pa.string())
    elif pa.types.is_timestamp(column.type):
        texts = pc.strftime(column, format='"%Y-%m-%dT%H:%M:%S+00:00"')
    elif pa.types.is_string(column.type):
        distinct = column.dictionary_encode()
        words = pa.array(
            [json.dumps(word, ensure_ascii=False) for word in distinct.dictionary.to_pylist()], pa.string()
        )
        texts = words.take(distinct.indices)
    else:
        texts = pa.array([json.dumps(value) for value in column.to_pylist()], pa.string())
    return texts.fill_null("null")


def open_table(folder: Path, name: str, schema: pa.Schema, *, form: TableFormat) -> TableWriter:
    """Return a writer of ``folder/name.parquet`` or ``folder/name.jsonl``."""
    kinds: dict[TableFormat, type[ParquetTable] | type[JsonlTable]] = {
        TableFormat.parquet: ParquetTable,
        TableFormat.jsonl: JsonlTable,
    }
    return kinds[form](folder / f"{name}.{form}", schema)


def flush_file(path: Path) -> None:
    """Make the content of a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
