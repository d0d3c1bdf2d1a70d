"""Which files a source's path names, and how they are opened: one file, a folder or a glob of parts, compressed or not.

A folder is read as warehouses write them: all its parts in the order of their names, ``_SUCCESS`` and hidden files left
out, and ``date=2025-03-01`` in a part's path is a column. What a text file is, its first bytes say, not its name.
"""

import difflib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote

from megatron_ads.errors import DataError

JSON_LINES = (".jsonl", ".json", ".ndjson")
TABLES = (".jsonl", ".parquet", ".csv", ".tsv", ".json", ".ndjson", ".pq")
_COMPRESSED = (".gz", ".gzip", ".bz2", ".zst")
_CODECS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
_NO_TEXT = {
    b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text", b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
}  # fmt: skip
_BOM = b"\xef\xbb\xbf"
_SHOWN = 50
"""Columns of a file that a message lists."""
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a source."""

    file: Path
    name: str
    """What its rows' ids begin with: the file's name, or its path below the source's folder."""
    partition: Mapping[str, str | None] = field(default_factory=dict)
    """Columns whose value the path says, ``date=2025-03-01``."""

    @property
    def form(self) -> str:
        """What is in it, by its suffix in lower case, without that of a compression."""
        return form_of(self.file)


class Span(NamedTuple):
    """The lines of a file that begin in a stretch of its bytes."""

    start: int
    end: int
    newlines_before: int
    """In the bytes before ``start``."""


class RowOrigin(NamedTuple):
    """Where a row was read."""

    part: Part
    number: int
    """From 1."""

    @property
    def row_id(self) -> str:
        """Return the id of a row that has none of its own."""
        return f"{self.part.name}-{self.number}"


def form_of(file: Path) -> str:
    """Return ``.csv`` for ``rows.CSV.gz``."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def parts_of(path: Path, forms: Collection[str] = TABLES) -> list[Part]:
    """Return the files that a source's path names, in the order of their names.

    Args:
        path: A file, whatever its name; a folder, read with all folders below it; or a glob of either.
        forms: Suffixes of a folder's files that are parts.

    Raises:
        DataError: If there is none, or the files of a folder are of several forms.
    """
    if path.is_file():
        return [Part(path, path.name)]
    matches = [path] if path.is_dir() else sorted(map(Path, glob(str(path), recursive=True)))
    if not matches:
        raise DataError(f"{path} is not a file. Check the path of this source.")
    base = path if path.is_dir() else Path(*takewhile(lambda name: not has_magic(name), path.parts))
    files = {file for match in matches for file in ([match] if match.is_file() else match.rglob("*"))}
    found = [
        Part(file, name.as_posix(), _partition(name))
        for file in sorted(files)
        for name in [file.relative_to(base)]
        if form_of(file) in forms and not any(each.startswith(("_", ".")) for each in name.parts)
        if file.is_file() and file.stat().st_size
    ]
    kinds = sorted({part.form for part in found})
    if not found:
        raise DataError(f"{path} holds no file that ends in {', '.join(forms)} and is not empty.")
    if len(kinds) > 1:
        raise DataError(f"{path} holds files of several forms, {', '.join(kinds)}. Name those of one: DIR/*{kinds[0]}")
    return found


def _partition(name: Path) -> dict[str, str | None]:
    pairs = [folder.split("=", 1) for folder in name.parts[:-1] if "=" in folder]
    return {column: None if value == _NO_VALUE else unquote(value) for column, value in pairs}


def is_plain_text(file: Path) -> bool:
    """Return whether a file can be read from the middle: it is not compressed."""
    with file.open("rb") as raw:
        magic = raw.read(4)
    return not any(magic.startswith(mark) for mark in _CODECS)


def open_text(file: Path) -> BinaryIO:
    """Open a file of UTF-8 text for reading, decompressed, behind its byte order mark.

    Raises:
        DataError: If there is no such file, or its first bytes are those of something else.
    """
    if not file.is_file():
        raise DataError(f"{file} is not a file. Check the path of this source.")
    with file.open("rb") as raw:
        magic = raw.read(4)
    codec = next((codec for mark, codec in _CODECS.items() if magic.startswith(mark)), None)
    if codec is None:
        stream: io.BufferedReader = file.open("rb")
    else:
        import pyarrow as pa

        stream = io.BufferedReader(pa.input_stream(str(file), compression=codec))
    try:
        magic = stream.peek(4)
        found = next((what for mark, what in _NO_TEXT.items() if magic.startswith(mark)), None)
        if found is None and b"\0" in magic[:4]:
            found = "UTF-16 text or no text at all"
        if found is not None:
            raise DataError(f"{file} is {found}, not UTF-8 text. Save it as UTF-8, or with the suffix of what it is.")
        if magic.startswith(_BOM):
            stream.read(len(_BOM))
    except OSError as error:
        stream.close()
        raise DataError(f"{file} cannot be decompressed ({error}). Copy or write it again.") from None
    except DataError:
        stream.close()
        raise
    return stream


def require_columns(file: Path, there: Sequence[str], columns: Sequence[str]) -> None:
    """Refuse a file that lacks a needed column, or has it more than once.

    Raises:
        DataError: Naming the column and those that are there.
    """
    for name in columns:
        if name not in there:
            names = [" ".join(each.split()) for each in sorted(there)]
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            near = difflib.get_close_matches(name, there, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"{file} has no column {name!r}; it has {', '.join(names[:_SHOWN])}{more}.{hint} Correct the source's "
                "columns."
            )
        if (times := there.count(name)) > 1:
            raise DataError(f"{file} has the column {name!r} {times} times. Rename all of them but one.")
