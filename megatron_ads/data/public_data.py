"""Find and read public data: below the folder that ``MEGATRON_ADS_DATA`` names, or at a path of one's own."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_ads.data.jsonl import read_objects
from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError

DATA_ROOT = "MEGATRON_ADS_DATA"


def locate(path: str | None, file: Path, *, kind: str) -> Path:
    """Return where a file of public data is.

    Args:
        path: The file, or the folder that holds it; None: below the data root.
        file: Its place below the data root.
        kind: The source kind that reads it.

    Raises:
        DataError: If neither ``path`` nor the environment names anything.
    """
    if path is not None:
        given = Path(path)
        return given if given.suffix == file.suffix else given / file.name
    root = os.environ.get(DATA_ROOT)
    if not root:
        raise DataError(
            f"The source kind {kind} reads {file} below the folder that the environment variable {DATA_ROOT} names, "
            f"and it names none. Set {DATA_ROOT}, or the source's path, or choose data=simulator."
        )
    return Path(root) / file


def read_rows(
    file: Path, read_record: Callable[[int, Mapping[str, Any]], ChatRow], *, limit: int | None
) -> list[ChatRow]:
    """Return the rows of a JSONL file, the first ``limit`` of them.

    Args:
        file: One record a line.
        read_record: Takes the number of a line and its record; raises ``DataError`` for one that cannot be used.
        limit: None: all.

    Raises:
        DataError: With the row number, for the first record that cannot be used.
    """
    rows: list[ChatRow] = []
    for number, record in read_objects(file):
        if len(rows) == limit:
            break
        try:
            rows.append(read_record(number, record))
        except DataError as error:
            raise DataError(f"{file}, row {number}: {error}") from None
    if not rows:
        raise DataError(f"{file} holds no rows.")
    return rows
