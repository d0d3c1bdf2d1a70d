"""Parquet files that appear under their names when they are complete, with facts about them in their metadata."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from conversion.atomic_file import naming_full_disk

PARTIAL = ".partial"


def write_table(file: Path, table: pa.Table, about: Mapping[str, str]) -> None:
    """Write a table, on disk when this returns.

    Raises:
        DiskFullError: If there is no room.
    """
    metadata = {**(table.schema.metadata or {}), **{name: text.encode() for name, text in about.items()}}
    partial = file.with_name(f"{file.name}.{os.getpid():x}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        with naming_full_disk(file), partial.open("wb") as stream:
            pq.write_table(table.replace_schema_metadata(metadata), stream, compression="zstd")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def metadata_of(file: Path) -> dict[str, str]:
    """Return what ``write_table`` was told about the table."""
    found = pq.read_schema(file).metadata or {}
    return {name.decode(): text.decode() for name, text in found.items() if name != b"ARROW:schema"}
