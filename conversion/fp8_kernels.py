"""FP8 loops compiled with numba: one pass over the bytes, no temporaries. The definition is in ``conversion/fp8.py``.

Arrays are flat and contiguous, with a row stride where a rectangle is cut out. The inner loops run over slices of one
block's row and in 32-bit arithmetic without branches, so that the compiler can vectorise them.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

_U = np.uint32
_MANTISSA_SHIFT = np.uint32(20)  # an e4m3 mantissa has 3 of FP32's 23 bits
_REBIAS = np.uint32((127 - 7) << 3)  # FP32's exponent bias minus e4m3's, above 3 mantissa bits
_REBIAS_FP32 = np.uint32((127 - 7) << 23)
_FIRST_NORMAL = np.uint32(8)  # the codes below it have no implicit leading one
_SUBNORMAL_STEP = np.float32(2.0**-9)
_SUBNORMAL_STEPS = np.float32(2.0**9)
_SMALLEST_NORMAL = np.float32(2.0**-6)
_TOO_LARGE = np.uint32(0x7F7F7F00)  # just below what rounds to an infinite BF16
_TOO_LARGE_ROUNDED_UP = np.uint32(0x7F780000)  # 2^7 * 1.9375: its e4m3 code under a scale of 2^120 is 2^8


@njit(cache=True, nogil=True)
def dequantize_rows(
    codes: NDArray[np.uint8],
    stride: int,
    first_row: int,
    columns: tuple[int, int],
    scales: NDArray[np.float32],
    block: tuple[int, int],
    out: NDArray[np.uint16],
) -> bool:
    """Write the BF16 bits of the codes in ``columns`` of every row; return whether a code was NaN.

    Args:
        codes: Whole rows, ``stride`` codes each, the first being row ``first_row`` of the stored weight.
        columns: As (start, stop).
        scales: Of the whole stored weight.
        out: ``rows * (stop - start)``.
    """
    start, stop = columns
    largest = _U(0)
    for row in range(len(codes) // stride):
        row_block = (first_row + row) // block[0]
        for column_block in range(start // block[1], (stop + block[1] - 1) // block[1]):
            first, last = max(start, column_block * block[1]), min(stop, (column_block + 1) * block[1])
            source = codes[row * stride + first : row * stride + last]
            target = out[row * (stop - start) + first - start : row * (stop - start) + last - start]
            scale = scales[row_block, column_block]
            for index in range(len(source)):
                code = _U(source[index])
                magnitude = _U(code & _U(0x7F))
                largest = _U(max(largest, magnitude))
                normal = _U(_U(magnitude << _MANTISSA_SHIFT) + _REBIAS_FP32).view(np.float32)
                subnormal = np.float32(np.float32(magnitude) * _SUBNORMAL_STEP)
                value = normal if magnitude >= _FIRST_NORMAL else subnormal
                bits = np.float32(value * scale).view(np.uint32)
                rounded = _U(bits + _U(_U(0x7FFF) + _U(_U(bits >> _U(16)) & _U(1))))  # ties to even
                sign = _U(_U(code & _U(0x80)) << _U(8))
                target[index] = np.uint16(_U(rounded >> _U(16)) ^ sign)
    return bool(largest == _U(0x7F))


@njit(cache=True, nogil=True)
def block_scales(
    bits: NDArray[np.uint32],
    shift: np.uint32,
    columns: int,
    block: tuple[int, int],
    power_of_two: bool,
    smallest: float,
    scales: NDArray[np.float32],
) -> bool:
    """Write amax / 448 of every block, 1 for a block of zeros; return whether all values can be read back as BF16.

    Args:
        bits: Flat rows of ``columns``, the first row beginning a block: FP32 values as uint32 with ``shift`` 0, or
            BF16 values as uint16 with ``shift`` 16.
        power_of_two: Round scales up to powers of two.
        smallest: Scales are at least this.
    """
    rows = len(bits) // columns
    finite = True
    limit = _TOO_LARGE_ROUNDED_UP if power_of_two else _TOO_LARGE
    for row_block in range(scales.shape[0]):
        for column_block in range(scales.shape[1]):
            last_column = min(columns, (column_block + 1) * block[1])
            amax = _U(0)  # FP32 magnitudes compare like their bits
            for row in range(row_block * block[0], min(rows, (row_block + 1) * block[0])):
                source = bits[row * columns + column_block * block[1] : row * columns + last_column]
                for index in range(len(source)):
                    amax = _U(max(amax, _U(_U(_U(source[index]) << shift) & _U(0x7FFFFFFF))))
            finite = finite and bool(amax < limit)
            scale = np.float32(_U(amax).view(np.float32) / np.float32(448.0))
            if power_of_two:
                scale = _U(_U(scale.view(np.uint32) + _U(0x7FFFFF)) & _U(0x7F800000)).view(np.float32)
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
    for row in range(len(bits) // columns):
        for column_block in range(scales.shape[1]):
            first = row * columns + column_block * block[1]
            last = row * columns + min(columns, (column_block + 1) * block[1])
            source, target = bits[first:last], out[first:last]
            scale = scales[row // block[0], column_block]
            for index in range(len(source)):
                value = _U(_U(source[index]) << shift).view(np.float32)
                quotient = np.float32(value / scale)
                encoded = np.float32(quotient).view(np.uint32)
                magnitude = _U(encoded & _U(0x7FFFFFFF))
                size = np.float32(abs(quotient))
                to_even = _U(_U(0x7FFFF) + _U(_U(magnitude >> _MANTISSA_SHIFT) & _U(1)))
                normal = _U(_U(_U(magnitude + to_even) >> _MANTISSA_SHIFT) - _REBIAS)
                subnormal = _U(np.int32(np.rint(np.float32(size * _SUBNORMAL_STEPS))))
                code = _U(subnormal if size < _SMALLEST_NORMAL else normal)
                target[index] = np.uint8(code | _U(_U(encoded >> _U(24)) & _U(0x80)))
