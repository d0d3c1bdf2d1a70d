"""Prepared rows in files: Arrow IPC, one file a portion of a source, memory-mapped.

Arrow and not Megatron's indexed dataset: a row here is more than its tokens (its id, task, weight, where its target
begins, and the digests by which rows are held out and repeats are found), and Arrow keeps these as columns of one file
whose pages are read only when they are used. The indexed dataset holds token sequences alone, so each of the others
would be a second file beside it, and its index is read whole at every start.

Loss weights are not stored: they are 0 for the prompt and the row's weight from there on.
"""

import os
import secrets
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_ads.data.split import KEY, KEY_BYTES
from megatron_ads.errors import DataError, one_line
from megatron_ads.rows import FittingRows, TokenizedRow

_KEY_TYPE = pa.binary(KEY_BYTES)
SCHEMA = pa.schema(
    [
        pa.field("tokens", pa.large_list(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("prompt", pa.int32(), nullable=False),  # tokens of the prompt, which carry no loss
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("id", pa.large_binary(), nullable=False),
        pa.field("declared", pa.large_binary(), nullable=False),  # the group as the row has it
        pa.field("task", pa.int16(), nullable=False),  # among those of the portion's report
        pa.field("number", pa.int64(), nullable=False),  # of the row in its file
        pa.field("reasons", pa.int8(), nullable=False),  # see Reasons
        pa.field("group", _KEY_TYPE, nullable=False),
        pa.field("question", _KEY_TYPE, nullable=False),
        pa.field("answer", _KEY_TYPE, nullable=False),
        pa.field("content", _KEY_TYPE, nullable=False),
        pa.field("time", pa.float64(), nullable=False),  # NaN: none
    ]
)
_FLUSH_TOKENS = 1 << 20


class Reasons(IntEnum):
    """Whether a row's target gives reasoning."""

    not_asked = 0
    """Rows of its task do not reason."""
    given = 1
    missing = 2


class PortionWriter:
    """Writes the rows of one portion, in batches that bound its memory; complete only after ``finish``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Not the process id alone: on two nodes, in containers above all, that is often the same.
        self._partial = path.with_name(f"{path.name}.{os.getpid():x}-{secrets.token_hex(4)}.partial")
        self._file = pa.OSFile(str(self._partial), "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        self._tokens: list[NDArray[np.int32]] = []
        self._waiting = 0
        self.batches: list[int] = []
        """Rows of each batch."""

    @property
    def rows(self) -> int:
        """Rows so far."""
        return sum(self.batches) + len(self._tokens)

    def append(self, tokens: NDArray[np.int32], **columns: Any) -> None:
        """Add a row."""
        self._tokens.append(tokens)
        for name, value in columns.items():
            self._columns[name].append(value)
        self._waiting += len(tokens)
        if self._waiting >= _FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self._tokens:
            return
        offsets = np.zeros(len(self._tokens) + 1, dtype=np.int64)
        np.cumsum([len(tokens) for tokens in self._tokens], out=offsets[1:])
        values = pa.array(np.concatenate(self._tokens))
        kind = SCHEMA.field("tokens").type
        buffers = [None, pa.py_buffer(offsets)]
        columns = [pa.Array.from_buffers(kind, len(self._tokens), buffers, children=[values])]
        columns += [pa.array(self._columns[name], SCHEMA.field(name).type) for name in SCHEMA.names[1:]]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
        self.batches.append(len(self._tokens))
        self._tokens, self._waiting = [], 0
        for values in self._columns.values():
            values.clear()

    def finish(self) -> None:
        """Write what is left, flush to disk and give the file its name."""
        self._flush()
        self._writer.close()
        self._file.close()
        descriptor = os.open(self._partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._partial.rename(self._path)

    def abandon(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


class StoredPortion(Protocol):
    """What must be known of a portion to read it."""

    name: str
    batches: list[int]
    tasks: list[str]


class _Batch(NamedTuple):
    """One record batch as views of the mapped file."""

    offsets: NDArray[np.int64]
    tokens: NDArray[np.int32]
    prompts: NDArray[np.int32]
    weights: NDArray[np.float32]
    id_offsets: NDArray[np.int64]
    ids: NDArray[np.uint8]
    tasks: NDArray[np.int16]


class RowFiles:
    """The portions of a prepared corpus, opened as they are used. Rows are numbered through all of them."""

    def __init__(self, folder: Path, portions: Sequence[StoredPortion]) -> None:
        """Take the reports of the portions, in their order."""
        self._folder, self._portions = folder, portions
        batches = [(portion, batch) for portion, report in enumerate(portions) for batch in range(len(report.batches))]
        self._places = batches
        sizes = [size for report in portions for size in report.batches]
        self._starts = [0, *accumulate(sizes)]
        self._open: dict[int, _Batch] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, number: int) -> TokenizedRow:
        """Return a row; its tokens are a view of the file."""
        index = bisect_right(self._starts, number) - 1
        batch, place = self._open.get(index) or self._batch(index), number - self._starts[index]
        tokens = batch.tokens[batch.offsets[place] : batch.offsets[place + 1]]
        weights = np.zeros(len(tokens), dtype=np.float32)
        weights[batch.prompts[place] :] = batch.weights[place]
        name = batch.ids[batch.id_offsets[place] : batch.id_offsets[place + 1]].tobytes()
        tasks = self._portions[self._places[index][0]].tasks
        return TokenizedRow(name.decode(errors="surrogatepass"), tasks[batch.tasks[place]], tokens, weights)

    def columns(self, name: str) -> Iterator[pa.Array]:
        """Yield one column of every batch, in order."""
        for index in range(len(self._places)):
            yield self._stored(index).column(name)

    def keys(self, name: str) -> NDArray[np.bytes_]:
        """Return a column of digests, (N,)."""
        parts = [np.frombuffer(column.buffers()[1], dtype=KEY)[: len(column)] for column in self.columns(name)]
        return np.concatenate([np.empty(0, dtype=KEY), *parts])

    def numbers(self, name: str) -> NDArray[Any]:
        """Return a column of numbers, (N,)."""
        return np.concatenate(
            [np.empty(0, SCHEMA.field(name).type.to_pandas_dtype()), *map(_array, self.columns(name))]
        )

    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of every row, (N,)."""
        return np.concatenate(
            [np.empty(0, np.int64), *(np.diff(_array(col.offsets)) for col in self.columns("tokens"))]
        )

    def texts(self, name: str) -> list[bytes]:
        """Return a column of texts in UTF-8."""
        return [text for column in self.columns(name) for text in column.to_pylist()]

    def tasks(self) -> list[str]:
        """Return the task of every row."""
        found: list[str] = []
        for (portion, _), column in zip(self._places, self.columns("task"), strict=True):
            names = self._portions[portion].tasks
            found += [names[code] for code in column.to_pylist()]
        return found

    def _stored(self, index: int) -> pa.RecordBatch:
        """Map a batch. Its file is not kept open, only mapped: a process may open fewer files than there are portions.

        Raises:
            DataError: If the file is gone or damaged.
        """
        portion, place = self._places[index]
        file = self._folder / self._portions[portion].name
        try:
            with pa.memory_map(str(file)) as mapped:
                return pa.ipc.open_file(mapped).get_batch(place)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(
                f"prepared rows cannot be read: {one_line(error)}. If {file.parent} was deleted or damaged, delete "
                "what is left of it and start the job again: the rows are prepared anew, and it continues from its "
                "latest checkpoint."
            ) from None

    def _batch(self, index: int) -> _Batch:
        stored = self._stored(index)
        tokens, ids = stored.column("tokens"), stored.column("id")
        _, id_offsets, id_bytes = ids.buffers()
        self._open[index] = batch = _Batch(
            offsets=_array(tokens.offsets),
            tokens=_array(tokens.values),
            prompts=_array(stored.column("prompt")),
            weights=_array(stored.column("weight")),
            id_offsets=np.frombuffer(id_offsets, dtype=np.int64),
            ids=np.frombuffer(id_bytes or b"", dtype=np.uint8),
            tasks=_array(stored.column("task")),
        )
        return batch


def _array(column: pa.Array) -> NDArray[Any]:
    found: NDArray[Any] = column.to_numpy(zero_copy_only=True)
    return found


class StoredRows(FittingRows):
    """Some rows of the files in an order of their own; nothing is read before it is asked for."""

    def __init__(self, files: RowFiles, numbers: NDArray[np.int64]) -> None:
        """Take the numbers of the rows, which may be memory-mapped."""
        self._files, self._numbers = files, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...

    @overload
    def __getitem__(self, index: slice) -> "StoredRows": ...

    def __getitem__(self, index: int | slice) -> "TokenizedRow | StoredRows":
        if isinstance(index, slice):
            return StoredRows(self._files, self._numbers[index])
        return self._files.row(int(self._numbers[index]))
