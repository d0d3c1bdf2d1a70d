"""Assemble any rectangle of a parameter from the stored pieces it consists of, a band of rows at a time.

Every container reduces to this: a Hugging Face folder stores a fused parameter as gate over up, a shards folder stores
tensor-parallel slices, torch_dist stores chunks. A vector is a matrix of one row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from conversion.errors import DamagedCheckpointError
from conversion.fp8 import BLOCK, dequantize
from conversion.names import HfPart, Parameter, Split, slice_shape
from conversion.safetensors_file import StoredTensor
from megatron_ads.errors import ConversionError

BAND_ELEMENTS = 1 << 20
"""Elements handled at a time: small enough to stay in a core's cache, large enough to amortise a call."""


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. Their sum, which takes no memory, almost always tells."""
    return not values.is_floating_point() or bool(values.sum().isfinite()) or bool(values.isfinite().all())


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A stored tensor with, if it is FP8, the block scales that give it values."""

    name: str
    data: StoredTensor
    scales: StoredTensor | None = None
    block: tuple[int, int] = BLOCK

    def __post_init__(self) -> None:
        if self.scales is None and self.data.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise DamagedCheckpointError(
                f"{self.name} in {self.data.file} is {self.data.dtype}; weights are BF16, FP16, FP32 or "
                "FP8 with scales."
            )

    @property
    def value_dtype(self) -> torch.dtype:
        """The dtype of the values: BF16 for FP8 codes, else as stored."""
        return torch.bfloat16 if self.scales is not None else self.data.dtype

    def values(self, rows: range, columns: range) -> torch.Tensor:
        """Return the values of a rectangle.

        Raises:
            DamagedCheckpointError: If a value, an FP8 code or a scale is NaN or infinite.
        """
        values = self.data.read_rows(rows.start, rows.stop)
        if self.scales is None:
            values = values[:, columns.start : columns.stop]
        else:
            scales = self.scales.read()
            if not bool(scales.isfinite().all()):
                raise DamagedCheckpointError(
                    f"The block scales of {self.name} in {self.scales.file} are not all finite; get a sound copy."
                )
            try:
                values = dequantize(values, scales, first_row=rows.start, columns=columns, block=self.block)
            except ConversionError as error:
                raise DamagedCheckpointError(
                    f"{self.name} in {self.data.file}, rows {rows.start} to {rows.stop - 1}: {error}. "
                    "The file is damaged or was quantised wrongly; get a sound copy."
                ) from None
        if not all_finite(values):
            raise DamagedCheckpointError(
                f"{self.name} in {self.data.file} has values that are NaN or infinite; get a sound copy."
            )
        return values


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Rows ``row`` to ``row + rows`` and columns ``column`` to ``column + columns`` of a matrix."""

    row: int
    column: int
    rows: int
    columns: int

    def overlap(self, other: "Rectangle") -> "Rectangle | None":
        """Return the common part, or None."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        columns = min(self.column + self.columns, other.column + other.columns) - column
        return Rectangle(row, column, rows, columns) if rows > 0 and columns > 0 else None


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle ``covers`` of a parameter and the stored matrix its values are in, from (``row``, ``column``) on."""

    covers: Rectangle
    stored: StoredMatrix
    row: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """One rectangle of a parameter, to be read from the regions that make up the parameter."""

    parameter: str
    regions: tuple[Region, ...]
    rectangle: Rectangle
    part: int | None = None
    """Number of the Hugging Face tensor in whose coordinates regions and rectangle are; None: the parameter's."""

    @classmethod
    def of(cls, parameter: str, regions: Sequence[Region], rectangle: Rectangle) -> "View":
        """Return a view that holds only those of a parameter's regions that the rectangle needs."""
        return cls(parameter, tuple(region for region in regions if rectangle.overlap(region.covers)), rectangle)

    @classmethod
    def of_part(cls, parameter: Parameter, regions: Sequence[Region], part: int) -> "View":
        """Return a view of all of one Hugging Face tensor of a parameter that consists of ``regions``."""
        tensor = parameter.parts[part]
        found = (
            _in_part(region, piece)
            for piece in part_pieces(parameter)
            if piece.part == tensor
            for region in regions
            if piece.at.overlap(region.covers)
        )
        return cls(parameter.name, tuple(found), whole(tensor.shape), part)


def whole(shape: Sequence[int]) -> Rectangle:
    """Return the rectangle of a whole tensor; a vector is one row."""
    if len(shape) > 1:
        return Rectangle(0, 0, shape[0], shape[1])
    return Rectangle(0, 0, 1, shape[0])


@dataclass(frozen=True, slots=True)
class PartPiece:
    """Consecutive rows of one Hugging Face tensor, which are a rectangle of the parameter."""

    part: HfPart
    at: Rectangle
    """Where in the parameter they are."""
    row: int
    """Where in the part they begin ..."""
    column: int
    """... which for a vector, a matrix of one row, is a column."""


def part_pieces(parameter: Parameter) -> Iterator[PartPiece]:
    """Yield the pieces of Hugging Face tensors that make up a parameter, in its order.

    Each part is one piece; of parameters that are stacked group by group, each group of each part is.
    """
    position, vector = 0, len(parameter.shape) == 1
    for group in range(parameter.groups):
        for part in parameter.parts:
            length = part.shape[0] // parameter.groups
            shape = whole((length, *part.shape[1:]))
            if vector:
                yield PartPiece(part, replace(shape, column=position), 0, group * length)
            else:
                yield PartPiece(part, replace(shape, row=position), group * length, 0)
            position += length


def part_values(parameter: Parameter, values: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and values of every Hugging Face tensor of a whole parameter: views, or copies where it has groups."""
    if len(parameter.parts) == parameter.groups == 1:  # nearly all of them
        yield parameter.parts[0].name, values
        return
    rows = [part.shape[0] // parameter.groups for part in parameter.parts]
    pieces = torch.split(values.view(parameter.groups, -1, *values.shape[1:]), rows, dim=1)
    for part, piece in zip(parameter.parts, pieces, strict=True):
        yield part.name, piece.flatten(0, 1)


def _in_part(region: Region, piece: PartPiece) -> Region:
    """Return what of a region is in a piece, in the coordinates of the Hugging Face tensor."""
    common = piece.at.overlap(region.covers)
    assert common is not None
    row, column = common.row - piece.at.row + piece.row, common.column - piece.at.column + piece.column
    return Region(
        Rectangle(row, column, common.rows, common.columns),
        region.stored,
        row=region.row + common.row - region.covers.row,
        column=region.column + common.column - region.covers.column,
    )


def value_dtype(regions: Sequence[Region]) -> torch.dtype:
    """Return the narrowest dtype that holds the values of all regions exactly."""
    return reduce(torch.promote_types, (region.stored.value_dtype for region in regions))


def fill(out: torch.Tensor, regions: Sequence[Region], target: Rectangle) -> None:
    """Write the values of a rectangle of a parameter into ``out``, of its shape, converted to its dtype."""
    covered = 0
    for region in regions:
        common = target.overlap(region.covers)
        if common is None:
            continue
        values = region_values(region, common)
        row, column = common.row - target.row, common.column - target.column
        out[row : row + common.rows, column : column + common.columns].copy_(values)
        covered += common.rows * common.columns
    if covered != target.rows * target.columns:
        raise ConversionError(f"The stored pieces cover {covered} of {target.rows * target.columns} elements.")


def region_values(region: Region, part: Rectangle) -> torch.Tensor:
    """Return the values of a rectangle of the parameter that lies inside ``region``; treat them as read-only."""
    row = part.row - region.covers.row + region.row
    column = part.column - region.covers.column + region.column
    return region.stored.values(range(row, row + part.rows), range(column, column + part.columns))


def bands(rectangle: Rectangle, multiple_of_rows: int = 1) -> Iterator[Rectangle]:
    """Cut a rectangle into bands of whole rows, about ``BAND_ELEMENTS`` each, of a multiple of some row count."""
    rows = max(BAND_ELEMENTS // max(rectangle.columns, 1), 1)
    rows = max(rows // multiple_of_rows, 1) * multiple_of_rows
    for row in range(0, rectangle.rows, rows):
        yield Rectangle(rectangle.row + row, rectangle.column, min(rows, rectangle.rows - row), rectangle.columns)


def slice_rectangles(parameter: Parameter, rank: int, size: int) -> tuple[Rectangle, ...]:
    """Return the rectangles that, stacked on dim 0, are the slice of ``rank`` out of ``size``.

    Raises:
        ConversionError: If the parameter cannot be split over ``size`` ranks.
    """
    full = whole(parameter.shape)
    sliced = whole(slice_shape(parameter, size))
    if parameter.split is Split.ROWS and len(parameter.shape) == 1:
        return (Rectangle(0, rank * sliced.columns if size > 1 else 0, 1, sliced.columns),)
    if parameter.split is Split.ROWS:
        return (Rectangle(rank * sliced.rows if size > 1 else 0, 0, sliced.rows, full.columns),)
    if parameter.split is Split.COLUMNS:
        return (Rectangle(0, rank * sliced.columns, full.rows, sliced.columns),)
    if parameter.split is Split.GATE_UP:
        half, part = full.rows // 2, sliced.rows // 2
        return tuple(Rectangle(start + rank * part, 0, part, full.columns) for start in (0, half))
    return (full,)
