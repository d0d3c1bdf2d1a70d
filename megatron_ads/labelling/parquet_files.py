"""Parquet files that appear under their names when they are complete, with facts about them in their metadata."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from conversion.atomic_file import PARTIAL_SUFFIX, write_small
from megatron_ads.errors import DataError, one_line


def write_table(file: Path, table: pa.Table, about: Mapping[str, str]) -> None:
    """Write a table, on disk when this returns.

    Raises:
        DiskFullError: If there is no room.
    """
    metadata = {**(table.schema.metadata or {}), **{name: text.encode() for name, text in about.items()}}
    written = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), written, compression="zstd")
    write_small(file, written.getvalue().to_pybytes())


def epoch_files(folder: Path) -> list[Path]:
    """Return the files of epochs in a folder, in order."""
    return sorted((file for file in folder.glob("*.parquet") if file.stem.isdecimal()), key=lambda file: int(file.stem))


def read_table(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return columns of a table; None: all.

    Raises:
        DataError: If it is damaged, or has not these columns.
    """
    try:
        table = pq.read_table(file, columns=None if columns is None else list(columns))
        return table if columns is None else table.select(list(columns))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise _damaged(file, error) from None


def metadata_of(file: Path) -> dict[str, str]:
    """Return what ``write_table`` was told about the table.

    Raises:
        DataError: If it is damaged.
    """
    try:
        found = pq.read_schema(file).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise _damaged(file, error) from None
    return {name.decode(): text.decode() for name, text in found.items() if name != b"ARROW:schema"}


def remove_partial(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder that nobody writes to."""
    for file in folder.glob(f"*{PARTIAL_SUFFIX}"):
        file.unlink(missing_ok=True)


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"{file} cannot be read ({one_line(error)}). Restore it; or remove it, and label into a new --out with its "
        "job's folder in previous: that labels its rows again."
    )
