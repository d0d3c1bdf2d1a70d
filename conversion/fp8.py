"""DeepSeek's FP8 storage: e4m3 codes with one FP32 ``weight_scale_inv`` per 128 x 128 block, edge blocks included.

    value = bf16( fp32(code) * scale )          scale = amax(block) / 448

Source: DeepSeek-V3, arXiv:2412.19437, section 3.3; the published ``inference/kernel.py``.
Shape suffixes: R = rows, C = columns, r = blocks of rows, c = blocks of columns.
"""

import torch

from megatron_ads.errors import ConversionError

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
