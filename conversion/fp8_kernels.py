"""FP8 loops compiled with numba: one pass over the bytes, no temporaries. The definition is in ``conversion/fp8.py``.

Arrays are flat and contiguous, with a row stride where a rectangle is cut out, so that the inner loops vectorise.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

_MANTISSA_SHIFT = np.uint32(20)  # an e4m3 mantissa has 3 of FP32's 23 bits
_REBIAS = np.uint32((127 - 7) << 3)  # FP32's exponent bias less e4m3's, in front of 3 mantissa bits
_SMALLEST_NORMAL = np.float32(2.0**-6)
_SUBNORMAL_STEPS = np.float32(2.0**9)


@njit(cache=True, nogil=True)
def dequantize_rows(
    codes: NDArray[np.uint8],
    stride: int,
    first_row: int,
    columns: tuple[int, int],
    scales: NDArray[np.float32],
    block: tuple[int, int],
    code_values: NDArray[np.float32],
    out: NDArray[np.uint16],
) -> bool:
    """Write the BF16 bits of the codes in ``columns`` of every row; return whether a code was NaN.

    A block has 16,384 codes of 256 kinds, so its products are rounded once into a table and then looked up.

    Args:
        codes: Whole rows, ``stride`` codes each, the first being row ``first_row`` of the stored weight.
        columns: As (start, stop).
        scales: Of the whole stored weight.
        code_values: FP32 value of each of the 256 codes.
        out: ``rows * len(columns)``.
    """
    start, stop = columns
    rows, width = len(codes) // stride, stop - start
    table = np.empty(256, np.uint16)
    largest = np.uint8(0)
    row = 0
    while row < rows:
        row_block = (first_row + row) // block[0]
        last_row = min(rows, (row_block + 1) * block[0] - first_row)
        column = start
        while column < stop:
            column_block = column // block[1]
            last_column = min(stop, (column_block + 1) * block[1])
            for code in range(256):
                bits = np.float32(code_values[code] * scales[row_block, column_block]).view(np.uint32)
                table[code] = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            for r in range(row, last_row):
                source, target = r * stride, r * width - start
                for c in range(column, last_column):
                    code = codes[source + c]
                    largest = np.uint8(max(largest, code & np.uint8(0x7F)))
                    out[target + c] = table[code]
            column = last_column
        row = last_row
    return bool(largest == np.uint8(0x7F))


@njit(cache=True, nogil=True)
def block_scales(
    bits: NDArray[np.uint32],
    shift: np.uint32,
    columns: int,
    block: tuple[int, int],
    smallest: float,
    scales: NDArray[np.float32],
) -> bool:
    """Write amax / 448 of every block, 1 for a block of zeros; return whether all values were finite.

    Args:
        bits: Flat rows of ``columns``, the first row beginning a block: FP32 values as uint32 with ``shift`` 0, or
            BF16 values as uint16 with ``shift`` 16.
        smallest: Scales are at least this.
    """
    rows = len(bits) // columns
    finite = True
    for row_block in range(scales.shape[0]):
        for column_block in range(scales.shape[1]):
            last_column = min(columns, (column_block + 1) * block[1])
            amax = np.uint32(0)  # FP32 magnitudes compare like their bits
            for r in range(row_block * block[0], min(rows, (row_block + 1) * block[0])):
                for c in range(r * columns + column_block * block[1], r * columns + last_column):
                    amax = np.uint32(max(amax, np.uint32(np.uint32(bits[c]) << shift) & np.uint32(0x7FFFFFFF)))
            finite = finite and bool(amax < np.uint32(0x7F800000))
            scale = np.float32(np.uint32(amax).view(np.float32) / np.float32(448.0))
            scales[row_block, column_block] = np.float32(1.0) if amax == 0 else max(scale, np.float32(smallest))
    return finite


@njit(cache=True, nogil=True)
def encode_rows(
    bits: NDArray[np.uint32],
    shift: np.uint32,
    columns: int,
    block: tuple[int, int],
    scales: NDArray[np.float32],
    out: NDArray[np.uint8],
) -> None:
    """Write the e4m3 code of ``value / scale``, rounded to nearest even; magnitudes must be below 464 after scaling.

    ``bits`` and ``shift`` are as in :func:`block_scales`.
    """
    rows = len(bits) // columns
    for r in range(rows):
        for column_block in range(scales.shape[1]):
            scale = scales[r // block[0], column_block]
            last = r * columns + min(columns, (column_block + 1) * block[1])
            for c in range(r * columns + column_block * block[1], last):
                value = np.uint32(np.uint32(bits[c]) << shift).view(np.float32)
                quotient = np.float32(value / scale)
                encoded = np.float32(quotient).view(np.uint32)
                magnitude = encoded & np.uint32(0x7FFFFFFF)
                to_even = np.uint32(0x7FFFF) + ((magnitude >> _MANTISSA_SHIFT) & np.uint32(1))
                kept = np.uint32(magnitude + to_even) >> _MANTISSA_SHIFT
                subnormal = np.uint32(np.rint(np.abs(quotient) * _SUBNORMAL_STEPS))
                code = subnormal if np.abs(quotient) < _SMALLEST_NORMAL else kept - _REBIAS
                out[c] = np.uint8(code | ((encoded >> np.uint32(24)) & np.uint32(0x80)))
