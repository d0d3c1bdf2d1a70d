"""DeepSeek's FP8 storage: e4m3 codes with one FP32 ``weight_scale_inv`` per 128 x 128 block, edge blocks included.

    value = bf16( fp32(code) * scale )          scale = amax(block) / 448

Source: DeepSeek-V3, arXiv:2412.19437, section 3.3; the published ``inference/kernel.py``.
Shape suffixes: R = rows, C = columns, r = blocks of rows, c = blocks of columns.
"""

import logging
from functools import cache
from types import ModuleType

import numpy as np
import torch

from megatron_ads.errors import ConversionError

_LOGGER = logging.getLogger(__name__)

BLOCK = (128, 128)
E4M3_MAX = 448.0
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # so that dividing by it cannot overflow


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Return the shape of the block scales of a weight of ``shape`` (R, C)."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def expand_scales(scale_rc: torch.Tensor, rows: range, columns: range, block: tuple[int, int] = BLOCK) -> torch.Tensor:
    """Return the scale of every element of a rectangle, ``(len(rows), len(columns))``."""
    row_blocks = torch.arange(rows.start, rows.stop) // block[0]
    column_blocks = torch.arange(columns.start, columns.stop) // block[1]
    return scale_rc[row_blocks[:, None], column_blocks[None, :]]


def dequantize(
    weight_RC: torch.Tensor,
    scale_rc: torch.Tensor,
    *,
    first_row: int = 0,
    first_column: int = 0,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """Return the BF16 values of FP8 codes: an FP32 multiply, rounded once.

    Args:
        weight_RC: float8_e4m3fn codes, a rectangle of the stored weight.
        scale_rc: FP32 scales of the whole stored weight.
        first_row: Row of the stored weight at which the rectangle begins.
        first_column: Column at which it begins.
    """
    rows = range(first_row, first_row + weight_RC.shape[0])
    columns = range(first_column, first_column + weight_RC.shape[1])
    return (weight_RC.float() * expand_scales(scale_rc, rows, columns, block)).bfloat16()


def quantize(values_RC: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes, FP32 scales) of a matrix. A block of zeros gets scale 1 and zero codes.

    Raises:
        ConversionError: If a value is NaN or infinite.
    """
    rows, columns = values_RC.shape
    block_rows, block_columns = scale_shape((rows, columns), block)
    padded = torch.zeros(block_rows * block[0], block_columns * block[1])
    padded[:rows, :columns] = values_RC
    blocks = padded.view(block_rows, block[0], block_columns, block[1])
    amax_rc = blocks.abs().amax(dim=(1, 3))
    if not bool(amax_rc.isfinite().all()):
        raise ConversionError("a value is NaN or infinite and has no FP8 code")
    scale_rc = torch.where(amax_rc == 0, 1.0, (amax_rc / E4M3_MAX).clamp(min=_SMALLEST_SCALE))
    codes = (blocks / scale_rc[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:rows, :columns].contiguous(), scale_rc


def has_nan_codes(weight: torch.Tensor) -> bool:
    """Whether any e4m3 code is one of the two NaNs (0x7F, 0xFF)."""
    return bool(((weight.view(torch.uint8) & 0x7F) == 0x7F).any())


def dequantize_rows(
    rows_RC: torch.Tensor,
    scale_rc: torch.Tensor,
    *,
    first_row: int,
    columns: range,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """Return what :func:`dequantize` gives for some columns of whole stored rows, by the fastest way there is.

    Raises:
        ConversionError: If one of the codes is NaN.
    """
    kernels = _kernels()
    if kernels is None:
        codes_RC = rows_RC[:, columns.start : columns.stop]
        found_nan = has_nan_codes(codes_RC)
        values = dequantize(codes_RC, scale_rc, first_row=first_row, first_column=columns.start, block=block)
    else:
        values = torch.empty(rows_RC.shape[0], len(columns), dtype=torch.bfloat16)
        found_nan = kernels.dequantize_rows(
            rows_RC.view(torch.uint8).reshape(-1).numpy(),
            rows_RC.shape[1],
            first_row,
            (columns.start, columns.stop),
            scale_rc.contiguous().numpy(),
            block,
            values.view(torch.uint16).view(-1).numpy(),
        )
    if found_nan:
        raise ConversionError("it holds FP8 NaN codes")
    return values


def quantize_rows(values_RC: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what :func:`quantize` gives, by the fastest way there is; errors as there."""
    kernels = _kernels()
    if kernels is None:
        return quantize(values_RC.float(), block)
    columns, values = values_RC.shape[1], values_RC.contiguous().view(-1)
    if values.dtype is torch.bfloat16:
        bits, shift = values.view(torch.uint16).numpy(), np.uint32(16)
    else:
        bits, shift = values.float().view(torch.uint32).numpy(), np.uint32(0)
    scale_rc = torch.empty(scale_shape(tuple(values_RC.shape), block))
    if not kernels.block_scales(bits, shift, columns, block, _SMALLEST_SCALE, scale_rc.numpy()):
        raise ConversionError("a value is NaN or infinite and has no FP8 code")
    codes_RC = torch.empty(values_RC.shape, dtype=torch.uint8)
    kernels.encode_rows(bits, shift, columns, block, scale_rc.numpy(), codes_RC.view(-1).numpy())
    return codes_RC.view(torch.float8_e4m3fn), scale_rc


@cache
def _kernels() -> ModuleType | None:
    """Return the compiled loops, or None where numba is not installed."""
    try:
        from conversion import fp8_kernels
    except ImportError as error:
        _LOGGER.warning("FP8 conversion is several times slower without numba (%s); install it for full speed.", error)
        return None
    return fp8_kernels
