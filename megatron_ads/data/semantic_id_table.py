"""Tables of semantic IDs, as ``megatron-ads sid`` writes them: which item has which ID."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_ads.errors import DataError, one_line

TABLE = "items.parquet"
ITEM, SEMANTIC_ID, CODES, TEXT = "item", "semantic_id", "codes", "text"
"""Columns: the item's id; its semantic ID, as text and as numbers; what it was embedded by, if it was a text."""
VERSION = b"codebook_version"
"""Key of the table's metadata: of which codebook it is."""


def read_semantic_ids(folder: Path) -> Mapping[str, str]:
    """Return the semantic ID of each item by its id, as text.

    Raises:
        DataError: If the folder has no such table.
    """
    status = _table_in(folder).stat()
    return _read(folder, (status.st_size, status.st_mtime_ns))


def read_columns(folder: Path, columns: Sequence[str]) -> pa.Table:
    """Return columns of a folder's table, with its metadata; errors as of ``read_semantic_ids``."""
    file = _table_in(folder)
    try:
        return pq.read_table(file, columns=list(columns))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({one_line(error)}). Make it again: megatron-ads sid encode.") from None


def _table_in(folder: Path) -> Path:
    if not (folder / TABLE).is_file():
        raise DataError(
            f"{folder} has no {TABLE}: it is no folder of semantic IDs. Make one: megatron-ads sid fit, or sid encode."
        )
    return folder / TABLE


@lru_cache(maxsize=2)
def _read(folder: Path, state: tuple[int, int]) -> Mapping[str, str]:
    """Return the IDs of a table; ``state`` tells apart what it held at different times."""
    table = read_columns(folder, [ITEM, SEMANTIC_ID])
    return dict(zip(table[ITEM].to_pylist(), table[SEMANTIC_ID].to_pylist(), strict=True))
