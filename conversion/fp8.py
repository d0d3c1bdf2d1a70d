"""DeepSeek's FP8 storage: e4m3 codes with one FP32 ``weight_scale_inv`` per 128 x 128 block, edge blocks included.

    value = bf16( fp32(code) * scale )          scale = amax(block) / 448, in DeepSeek-V3.1 up to a power of two

Source: DeepSeek-V3, arXiv:2412.19437, section 3.3; the published ``inference/kernel.py``.
Shape suffixes: R = rows, C = columns, r = blocks of rows, c = blocks of columns.
"""

import numpy as np
import torch

from megatron_ads.errors import ConversionError

BLOCK = (128, 128)
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # so that dividing by it cannot overflow


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Return the shape of the block scales of a weight of ``shape`` (R, C)."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantize(
    codes_RC: torch.Tensor,
    scale_rc: torch.Tensor,
    *,
    first_row: int = 0,
    columns: range | None = None,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """Return the BF16 values of FP8 codes: an FP32 multiply, rounded once.

    Args:
        codes_RC: float8_e4m3fn codes, whole rows of the stored weight.
        scale_rc: FP32 scales of the whole stored weight.
        first_row: Row of the stored weight at which the codes begin.
        columns: Which columns to return; None returns all.

    Raises:
        ConversionError: If one of the codes in ``columns`` is NaN.
    """
    from conversion import fp8_kernels  # imports numba, which is needed only where there are FP8 codes

    columns = range(codes_RC.shape[1]) if columns is None else columns
    values = torch.empty(codes_RC.shape[0], len(columns), dtype=torch.bfloat16)
    found_nan = fp8_kernels.dequantize_rows(
        codes_RC.view(torch.uint8).reshape(-1).numpy(),
        codes_RC.shape[1],
        first_row,
        (columns.start, columns.stop),
        scale_rc.contiguous().numpy(),
        block,
        values.view(torch.uint16).view(-1).numpy(),
    )
    if found_nan:
        raise ConversionError("it holds FP8 NaN codes")
    return values


def quantize(
    values_RC: torch.Tensor, block: tuple[int, int] = BLOCK, *, power_of_two_scales: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes, FP32 scales) of a matrix. A block of zeros gets scale 1 and zero codes.

    Args:
        power_of_two_scales: Round scales up to powers of two (``scale_fmt: ue8m0``).

    Raises:
        ConversionError: If a value is NaN or infinite, or would be when it is read back as BF16.
    """
    from conversion import fp8_kernels as kernels

    columns, values = values_RC.shape[1], values_RC.contiguous().view(-1)
    if values.dtype is torch.bfloat16:
        bits, shift = values.view(torch.uint16).numpy(), np.uint32(16)
    else:
        bits, shift = values.float().view(torch.uint32).numpy(), np.uint32(0)
    scale_rc = torch.empty(scale_shape(tuple(values_RC.shape), block))
    if not kernels.block_scales(bits, shift, columns, block, power_of_two_scales, _SMALLEST_SCALE, scale_rc.numpy()):
        raise ConversionError("a value is NaN or infinite, or beyond BF16, and has no FP8 code")
    codes_RC = torch.empty(values_RC.shape, dtype=torch.uint8)
    kernels.encode_rows(bits, shift, columns, block, scale_rc.numpy(), codes_RC.view(-1).numpy())
    return codes_RC.view(torch.float8_e4m3fn), scale_rc
