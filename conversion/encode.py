"""Turn planned items into bytes at offsets, a band of rows at a time, so that memory does not grow with the tensor."""

import io
from collections.abc import Iterator

import torch

from conversion.atomic_file import PreallocatedFile, tensor_bytes
from conversion.errors import DamagedCheckpointError
from conversion.fp8 import dequantize, quantize
from conversion.plan import Quantized, SavedChunk, SavedObject, Values
from conversion.regions import Rectangle, StoredMatrix, View, all_finite, bands, fill, region_values, value_dtype
from conversion.workers import Advance
from megatron_ads.errors import ConversionError

_EMPTY_EXTRA_STATE = [None]
"""What Megatron-Core accepts as the extra state of a layer that has none."""


def append_saved(out: PreallocatedFile, item: SavedChunk | SavedObject, position: int, advance: Advance) -> int:
    """Append what ``torch.save`` makes of an item, at ``position``; return where it ends."""
    archive = io.BytesIO()
    if isinstance(item, SavedObject):
        torch.save(_EMPTY_EXTRA_STATE, archive)
        return out.write_at(position, archive.getbuffer())
    (view,) = item.views
    values = torch.empty(view.rectangle.rows, view.rectangle.columns, dtype=item.dtype)
    for band in bands(view.rectangle):
        first = band.row - view.rectangle.row
        fill(values[first : first + band.rows], view.regions, band)
    torch.save(values.view(item.shape), archive)
    advance(values.nbytes)
    return out.write_at(position, archive.getbuffer())


def write_values(out: PreallocatedFile, item: Values, advance: Advance) -> None:
    """Write one tensor's values."""
    position = item.offset
    for view in item.views:
        for band in bands(view.rectangle):
            data = tensor_bytes(_values(view, band, item.dtype))
            position = out.write_at(position, data)
            advance(len(data))


def _values(view: View, band: Rectangle, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of a band in ``dtype``, mapped rather than copied if one stored piece of that dtype has them.

    Raises:
        DamagedCheckpointError: If a value is beyond ``dtype``.
    """
    for region in view.regions:
        if band.overlap(region.covers) == band and region.stored.value_dtype is dtype:
            return region_values(region, band)
    values = torch.empty(band.rows, band.columns, dtype=dtype)
    fill(values, view.regions, band)
    if not all_finite(values):
        raise DamagedCheckpointError(f"{view.parameter} has values beyond {dtype}; they would become infinite.")
    return values


def write_quantized(out: PreallocatedFile, item: Quantized, advance: Advance) -> float | None:
    """Write one weight's FP8 codes and scales.

    Returns:
        None without a reference or if the reference's codes were kept; else the largest relative error of quantising
        again, ``max|value - bf16(code * scale)| / max|value|``.
    """
    if item.reference is not None and _equals_reference(item, item.reference):
        _copy_reference(out, item, item.reference, advance)
        return None
    codes_at, scales_at = item.codes_offset, item.scales_offset
    largest_error = largest_value = 0.0
    for _, values in _band_values(item):
        try:
            codes, scales = quantize(values, item.block, power_of_two_scales=item.power_of_two_scales)
        except ConversionError as error:
            raise DamagedCheckpointError(f"{item.name} cannot be written in FP8: {error}.") from None
        if codes_at is not None:
            codes_at = out.write_at(codes_at, tensor_bytes(codes))
            advance(codes.numel())
        if scales_at is not None:
            scales_at = out.write_at(scales_at, tensor_bytes(scales))
            advance(scales.numel() * 4)
        if item.reference is not None:
            back = dequantize(codes, scales, block=item.block).float()
            largest_error = max(largest_error, float((back - values.float()).abs().max()))
            largest_value = max(largest_value, float(values.float().abs().max()))
    if item.reference is None:
        return None
    return largest_error / largest_value if largest_value else 0.0


def _band_values(item: Quantized) -> Iterator[tuple[Rectangle, torch.Tensor]]:
    dtype = value_dtype(item.view.regions)
    for band in bands(item.view.rectangle, multiple_of_rows=item.block[0]):
        yield band, _values(item.view, band, dtype)


def _equals_reference(item: Quantized, reference: StoredMatrix) -> bool:
    for band, values in _band_values(item):
        first = band.row - item.view.rectangle.row
        kept = reference.values(range(first, first + band.rows), range(band.columns))
        if not torch.equal(kept.view(torch.int16), values.bfloat16().view(torch.int16)):
            return False
    return True


def _copy_reference(out: PreallocatedFile, item: Quantized, reference: StoredMatrix, advance: Advance) -> None:
    if item.codes_offset is not None:
        position, data = item.codes_offset, reference.data
        for band in bands(Rectangle(0, 0, data.rows, data.columns)):
            piece = tensor_bytes(data.read_rows(band.row, band.row + band.rows))
            position = out.write_at(position, piece)
            advance(len(piece))
    if item.scales_offset is not None:
        assert reference.scales is not None
        piece = tensor_bytes(reference.scales.read())
        out.write_at(item.scales_offset, piece)
        advance(len(piece))
