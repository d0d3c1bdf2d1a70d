"""The items that get semantic IDs: an id, a text and, where vectors are given, one of them each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.bad_rows import BadRowError
from megatron_ads.data.source_files import parts_of, require_columns
from megatron_ads.data.table_fields import text_of
from megatron_ads.data.table_files import Cell, column_types, read_table
from megatron_ads.errors import DataError

Vectors = NDArray[np.float32]
SEPARATOR = "; "
"""Between the columns of a text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Items:
    """Items in the order of their file."""

    ids: tuple[str, ...]
    """Each once."""
    texts: tuple[str, ...]
    """Empty where an item has none."""
    vector_ND: Vectors | None
    """None: they are made of the texts."""


def read_items(path: Path, *, id_column: str, text_columns: Sequence[str], vectors: str | None) -> Items:
    """Return the items of a table.

    Args:
        path: JSONL, Parquet or CSV, as of source kind ``table``.
        id_column: What an item is called in logs.
        text_columns: Parts of its text.
        vectors: A file ``.npy`` of (N, D) in the order of the items, or the column that holds a list of numbers each.

    Raises:
        DataError: If a file cannot be read, an item has no id or one of another, or vectors do not fit the items.
    """
    column = None if vectors is None or vectors.endswith(".npy") else vectors
    needed = list(dict.fromkeys([id_column, *text_columns, *([column] if column else [])]))
    ids: dict[str, None] = {}
    texts, found, unseen = [], [], set(text_columns)
    parts = parts_of(path)
    for part in parts:
        for number, cells in read_table(part, needed):
            try:
                if isinstance(cells, BadRowError):
                    raise cells
                name = text_of(cells, id_column)
                if name in ids:
                    raise DataError(f"{id_column} {name!r} is there twice.")
                ids[name] = None
                words = {each: text for each in text_columns if (text := _text(cells[each]))}
                texts.append(SEPARATOR.join(words.values()))
                unseen -= words.keys()
                if column is not None:
                    found.append(_vector(cells[column], column))
            except DataError as error:
                raise DataError(f"{part.file}, row {number}: {error}") from None
    if not ids:
        raise DataError(f"{path} holds no items.")
    if unseen:  # in JSONL a column that is nowhere reads like an empty one
        require_columns(path, sorted({name for part in parts for name in column_types(part, len(ids))}), sorted(unseen))
    vector_ND = _stacked(found, path) if column else None if vectors is None else _stored(Path(vectors), len(ids))
    return Items(ids=tuple(ids), texts=tuple(texts), vector_ND=vector_ND)


def _text(cell: Cell) -> str:
    parts = cell if isinstance(cell, list) else [cell]
    return " ".join(" ".join(str(part).split()) for part in parts if part is not None)


def _vector(cell: Any, column: str) -> Vectors:
    if not isinstance(cell, list) or not cell or not all(type(each) in (int, float) for each in cell):
        raise DataError(f"{column} is {cell!r:.60}; it must be a list of numbers.")
    return np.asarray(cell, dtype=np.float32)


def _stacked(vectors: Sequence[Vectors], path: Path) -> Vectors:
    lengths = sorted({len(vector) for vector in vectors})
    if len(lengths) > 1:
        raise DataError(f"{path} holds vectors of {lengths[0]} and of {lengths[-1]} numbers. Give all the same length.")
    return _finite(np.stack(vectors), path)


def _stored(file: Path, items: int) -> Vectors:
    try:
        stored = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} cannot be read as .npy ({error}). Write it with numpy.save.") from None
    if stored.ndim != 2 or len(stored) != items or stored.dtype.kind not in "fiu":
        raise DataError(
            f"{file} holds {stored.dtype} of shape {stored.shape}; the {items} items need numbers of shape ({items}, "
            "dimensions), in the order of the items."
        )
    return _finite(np.asarray(stored, dtype=np.float32), file)


def _finite(vector_ND: Vectors, path: Path) -> Vectors:
    odd_N = ~np.isfinite(vector_ND).all(1)
    if odd_N.any():
        raise DataError(
            f"Vectors of {path} are not finite, first that of item {int(odd_N.argmax()) + 1}. Leave such items out."
        )
    return vector_ND
