"""Compare two checkpoints of any formats: every parameter, copy and bit, and what each says of itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

import torch

from conversion.atomic_file import FileRecord, hash_file
from conversion.errors import DamagedCheckpointError
from conversion.hf_folder import HfFolder
from conversion.plan import in_groups
from conversion.regions import Region, bands, fill, value_dtype, whole
from conversion.shards import MANIFEST
from conversion.sources import WeightSource, open_source, stored_dtype
from conversion.to_hf import untrue_fields
from conversion.workers import Advance, run_all
from megatron_ads.progress import Progress

_BYTES_PER_PIECE_OF_WORK = 256 << 20


class DifferenceKind(StrEnum):
    """What can be wrong."""

    DAMAGED = "damaged"
    """The checkpoint contradicts itself: truncated, incomplete, stale index, NaN, not the bytes that were written."""
    CONFIG = "config"
    """The two are different models, or a config.json contradicts its own weights."""
    MISSING = "missing"
    """In A only."""
    EXTRA = "extra"
    """In B only."""
    SHAPE = "shape"
    DTYPE = "dtype"
    VALUES = "values"


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One thing that is not the same."""

    name: str
    kind: DifferenceKind
    detail: str
    first_index: tuple[int, ...] | None = None
    """Of the full parameter, where values differ first."""
    largest: float | None = None
    """Largest ``|a - b|``; NaN if one side is NaN."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The result of comparing A with B."""

    compared: int
    """Tensors compared, repeats included."""
    compared_bytes: int
    seconds: float
    differences: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


@dataclass(frozen=True, slots=True)
class TensorPair:
    """One tensor of both checkpoints, with every stored copy of it."""

    name: str
    shape: tuple[int, ...]
    a: tuple[tuple[Region, ...], ...]
    b: tuple[tuple[Region, ...], ...]
    dtypes: tuple[torch.dtype, torch.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes that one comparison of it handles."""
        extent = whole(self.shape)
        return extent.rows * extent.columns * self.dtypes[0].itemsize * max(len(self.a), len(self.b))


def verify(a: Path, b: Path, *, tolerance: float = 0.0, workers: int = 1, progress: bool = False) -> Verification:
    """Compare two checkpoints exhaustively.

    With ``tolerance`` 0, values must be bit for bit the same after FP8 is dequantised, and dtypes equal. A positive one
    allows ``|a - b|`` up to it, and different dtypes.

    Raises:
        ConversionError: If a path is no checkpoint at all. A damaged checkpoint is a difference, not an error.
    """
    opened, damage = [], []
    for label, path in (("A", a), ("B", b)):
        try:
            opened.append(open_source(path))
        except DamagedCheckpointError as error:
            damage.append(Difference(name=label, kind=DifferenceKind.DAMAGED, detail=str(error)))
    if damage:
        return Verification(compared=0, compared_bytes=0, seconds=0.0, differences=tuple(damage))
    differences = list(_structural_differences(opened[0], opened[1]))
    for label, source in zip("AB", opened, strict=True):
        if isinstance(source.container, HfFolder):
            for field, detail in untrue_fields(source.container):
                differences.append(Difference(name=f"{label}: {field}", kind=DifferenceKind.CONFIG, detail=detail))
    pairs = list(_pairs(opened[0], opened[1]))
    total = sum(pair.nbytes for pair in pairs)
    files = {*opened[0].written, *opened[1].written}
    groups = in_groups(pairs, lambda pair: pair.nbytes, _BYTES_PER_PIECE_OF_WORK)
    work = [*map(tuple, groups), *sorted(files, key=lambda file: file.name)]
    nbytes = total + sum(file.nbytes for file in files)
    with Progress(nbytes, description="comparing", unit="B", shown=progress) as shown:
        compare = partial(_compare_piece, tolerance)
        for found in run_all(compare, work, workers=workers, advance=shown.update):
            differences += found
    order = {pair.name: number for number, pair in enumerate(pairs)}
    differences.sort(key=lambda difference: order.get(difference.name, -1))
    return Verification(
        compared=len(pairs), compared_bytes=total, seconds=shown.seconds, differences=tuple(differences)
    )


def _structural_differences(a: WeightSource, b: WeightSource) -> Iterator[Difference]:
    for field, (value, other) in a.shape.differences(b.shape).items():
        yield Difference(name=field, kind=DifferenceKind.CONFIG, detail=f"{value} in A, {other} in B")
    names_a, names_b = [*a.names(), *a.aliases], [*b.names(), *b.aliases]
    for kind, here, there in ((DifferenceKind.MISSING, names_a, names_b), (DifferenceKind.EXTRA, names_b, names_a)):
        absent = set(there)
        for name in here:
            if name not in absent:
                side = "A" if kind is DifferenceKind.MISSING else "B"
                yield Difference(name=name, kind=kind, detail=f"only in {side}")


def _pairs(a: WeightSource, b: WeightSource) -> Iterator[TensorPair]:
    names_b = set(b.names())
    for name in a.names():
        if name in names_b:
            left, right = a.parameter(name), b.parameter(name)
            copies = a.replicas(name), b.replicas(name)
            dtypes = stored_dtype(left, copies[0][0]), stored_dtype(right, copies[1][0])
            yield TensorPair(name, left.shape, *copies, dtypes)
    for alias in a.aliases:
        if alias in b.aliases and (isinstance(a.container, HfFolder) or isinstance(b.container, HfFolder)):
            regions = _alias_regions(a, alias), _alias_regions(b, alias)
            dtype = value_dtype((*regions[0], *regions[1]))  # Megatron stores it once: a repeat's own dtype may differ
            shape = a.parameter(a.aliases[alias]).shape
            yield TensorPair(alias, shape, (regions[0],), (regions[1],), (dtype, dtype))


def _alias_regions(source: WeightSource, alias: str) -> tuple[Region, ...]:
    if isinstance(source.container, HfFolder):
        return (Region(whole(source.parameter(source.aliases[alias]).shape), source.container.matrix(alias)),)
    return source.regions(source.aliases[alias])


def _compare_piece(tolerance: float, piece: tuple[TensorPair, ...] | FileRecord, advance: Advance) -> list[Difference]:
    """Compare pairs with each other, or a file with what was written."""
    found = []
    if isinstance(piece, FileRecord):
        file = Path(piece.name)
        if hash_file(file) != piece.sha256:
            detail = f"{file} was changed since it was written: its SHA-256 is not that of {MANIFEST}"
            found.append(Difference(name=file.name, kind=DifferenceKind.DAMAGED, detail=detail))
        advance(piece.nbytes)
        return found
    for pair in piece:
        try:
            difference = _compare(pair, tolerance)
        except DamagedCheckpointError as error:
            difference = Difference(name=pair.name, kind=DifferenceKind.DAMAGED, detail=str(error))
        if difference is not None:
            found.append(difference)
        advance(pair.nbytes)
    return found


def _compare(pair: TensorPair, tolerance: float) -> Difference | None:
    for regions in (*pair.a, *pair.b):
        area = sum(region.covers.rows * region.covers.columns for region in regions)
        extent = whole(pair.shape)
        if area != extent.rows * extent.columns:
            detail = f"{pair.shape} in A; the pieces in B have {area} elements"
            return Difference(name=pair.name, kind=DifferenceKind.SHAPE, detail=detail)
    if tolerance == 0 and pair.dtypes[0] != pair.dtypes[1]:
        detail = f"{pair.dtypes[0]} in A, {pair.dtypes[1]} in B"
        return Difference(name=pair.name, kind=DifferenceKind.DTYPE, detail=detail)
    comparisons = [(copy, pair.b[0]) for copy in pair.a] + [(pair.a[0], copy) for copy in pair.b[1:]]
    compared = (_compare_values(pair, left, right, tolerance) for left, right in comparisons)
    return next((difference for difference in compared if difference is not None), None)


def _compare_values(
    pair: TensorPair, left: tuple[Region, ...], right: tuple[Region, ...], tolerance: float
) -> Difference | None:
    first: tuple[int, ...] | None = None
    count, largest = 0, 0.0
    dtype = torch.promote_types(*pair.dtypes)
    for band in bands(whole(pair.shape)):
        a, b = (torch.empty(band.rows, band.columns, dtype=dtype) for _ in range(2))
        fill(a, left, band)
        fill(b, right, band)
        if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            continue
        distance = (a.float() - b.float()).abs()
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        differs = a.view(integer) != b.view(integer) if tolerance == 0 else ~(distance <= tolerance)
        if bool(differs.any()):
            if first is None:
                row, column = (int(number) for number in differs.nonzero()[0])
                first = (band.row + row, column) if len(pair.shape) > 1 else (column,)
            count += int(differs.sum())
            largest = float(torch.maximum(torch.tensor(largest), distance[differs].max()))
    if first is None:
        return None
    detail = f"{count} elements differ, first in {left[0].stored.data.file.name} / {right[0].stored.data.file.name}"
    return Difference(name=pair.name, kind=DifferenceKind.VALUES, detail=detail, first_index=first, largest=largest)


def check_aliases(source: WeightSource) -> None:
    """Compare every stored repeat with what it repeats.

    Raises:
        DamagedCheckpointError: If one differs: the MTP layer was trained with its own embedding or head, which
            no Megatron-Core model has.
    """
    folder = source.container
    if not isinstance(folder, HfFolder):
        return
    for alias, canonical in folder.aliases.items():
        repeat, original = _alias_regions(source, alias), source.regions(canonical)
        shape, dtypes = source.parameter(canonical).shape, (value_dtype(repeat), value_dtype(original))
        pair = TensorPair(alias, shape, (repeat,), (original,), dtypes)
        if _compare_values(pair, repeat, original, tolerance=0) is not None:
            raise DamagedCheckpointError(
                f"{alias} in {folder.tensors[alias].file} differs from {canonical}, which it should repeat: "
                "Megatron-Core stores them once. The checkpoint was changed after training, or its model has two "
                "tensors there."
            )
