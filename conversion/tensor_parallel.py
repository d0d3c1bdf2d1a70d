"""Which rectangles of a full parameter make up one tensor-parallel rank's slice."""

from conversion.names import Parameter, Split, slice_shape
from conversion.regions import Rectangle, whole


def slice_rectangles(parameter: Parameter, rank: int, size: int) -> tuple[Rectangle, ...]:
    """Return the rectangles that, stacked on dim 0, are the slice of ``rank`` out of ``size``.

    Raises:
        ConversionError: If the parameter cannot be split over ``size`` ranks.
    """
    full = whole(parameter.shape)
    sliced = whole(slice_shape(parameter, size))
    if parameter.split is Split.ROWS:
        return (Rectangle(rank * sliced.rows if size > 1 else 0, 0, sliced.rows, full.columns),)
    if parameter.split is Split.COLUMNS:
        return (Rectangle(0, rank * sliced.columns, full.rows, sliced.columns),)
    if parameter.split is Split.GATE_UP:
        half, part = full.rows // 2, sliced.rows // 2
        return tuple(Rectangle(start + rank * part, 0, part, full.columns) for start in (0, half))
    return (full,)


def expert_or_tensor(parameter: Parameter, *, tensor: int, expert: int) -> int:
    """Return the expert-tensor-parallel number for a routed expert, else the tensor-parallel one."""
    return tensor if parameter.expert is None else expert
