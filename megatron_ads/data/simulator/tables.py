"""Write large tables piece by piece, as Parquet or JSON lines; memory does not grow with the table."""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
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
        self._file = path.open("w", encoding="utf-8")

    def append(self, table: pa.Table) -> None:
        """Write one line a row."""
        for batch in table.to_batches(max_chunksize=20_000):
            lines = [json.dumps(row, ensure_ascii=False, default=_readable) + "\n" for row in batch.to_pylist()]
            self._file.writelines(lines)

    def close(self) -> None:
        """Flush."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


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


def _readable(value: Any) -> str:
    text: str = value.isoformat()  # the only values JSON does not know are times
    return text
