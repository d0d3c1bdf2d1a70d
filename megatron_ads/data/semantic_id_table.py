"""Tables of semantic IDs, as ``megatron-ads sid`` writes them: which item has which ID."""

from collections.abc import Mapping
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
    file = folder / TABLE
    if not file.is_file():
        raise DataError(
            f"{folder} has no {TABLE}: it is no folder of semantic IDs. Make one: megatron-ads sid fit, or sid encode."
        )
    status = file.stat()
    return _read(file, (status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=2)
def _read(file: Path, state: tuple[int, int]) -> Mapping[str, str]:
    """Return a table's IDs; ``state`` tells apart what a file held at different times."""
    try:
        table = pq.read_table(file, columns=[ITEM, SEMANTIC_ID])
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} cannot be read ({one_line(error)}). Make it again: megatron-ads sid encode.") from None
    return dict(zip(table[ITEM].to_pylist(), table[SEMANTIC_ID].to_pylist(), strict=True))
