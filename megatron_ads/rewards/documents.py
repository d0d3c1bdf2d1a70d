"""Texts that rewards are fitted to or search in: one document a row of a JSONL, Parquet, CSV or TSV file."""

from pathlib import Path

from megatron_ads.data.bad_rows import BadRowError
from megatron_ads.data.source_files import parts_of
from megatron_ads.data.table_files import read_table
from megatron_ads.errors import ConfigError, DataError


def read_documents(path: str, columns: list[str], setting: str) -> list[tuple[str, ...]]:
    """Return the cells of some columns, as texts, of every document.

    Args:
        path: A file, or a folder or glob of parts.
        columns: Those wanted.
        setting: Which names the path, for messages.

    Raises:
        ConfigError: If it cannot be read, lacks a column or holds no document.
    """
    found = []
    try:
        for part in parts_of(Path(path)):
            for number, row in read_table(part, columns):
                if isinstance(row, BadRowError):
                    raise DataError(f"{part.file}, row {number}: {row}")
                found.append(tuple("" if row[name] is None else str(row[name]) for name in columns))
    except DataError as error:
        raise ConfigError(f"{setting} cannot be read: {error}") from None
    if not found:
        raise ConfigError(f"{setting} is {path}, which holds no row.")
    return found
