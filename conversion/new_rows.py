"""Write what a grown vocabulary needs: bytes of the source as they are, and the rows that new tokens begin with."""

import zlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from conversion.atomic_file import PreallocatedFile, tensor_bytes
from conversion.plan import Copied, NewRows
from conversion.safetensors_file import StoredTensor, map_bytes
from conversion.workers import Advance

_PIECE_BYTES = 32 << 20
_PIECE_ROWS = 2048


def copy_bytes(out: PreallocatedFile, item: Copied, advance: Advance) -> None:
    """Copy an item piece by piece."""
    for start in range(0, item.nbytes, _PIECE_BYTES):
        length = min(_PIECE_BYTES, item.nbytes - start)
        out.write_at(item.offset + start, tensor_bytes(map_bytes(item.file, item.at + start, length)))
        advance(length)


def write_new_rows(out: PreallocatedFile, item: NewRows, advance: Advance) -> None:
    """Draw the rows of an item, a few at a time; each depends on its number, and not on how many there are."""
    mean_D, deviation_D = _moments(item.like, item.old)
    key = (item.seed, zlib.crc32(item.parameter.encode()))
    offset = item.offset
    for first in range(item.first, item.end, _PIECE_ROWS):
        numbers = range(first, min(first + _PIECE_ROWS, item.end))
        noise_RD = torch.stack([_normal((*key, number), len(mean_D)) for number in numbers])
        rows_RD = (mean_D + item.noise * deviation_D * noise_RD).to(item.dtype)
        offset = out.write_at(offset, tensor_bytes(rows_RD))
        advance(rows_RD.nbytes)


def _normal(key: tuple[int, ...], length: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(key).standard_normal(length))


@lru_cache(maxsize=4)
def _moments(stored: StoredTensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column of the first ``rows`` rows, in FP64."""
    total_D = torch.zeros(stored.columns, dtype=torch.float64)
    squares_D = torch.zeros_like(total_D)
    for first in range(0, rows, _PIECE_ROWS):
        rows_RD = stored.read_rows(first, min(first + _PIECE_ROWS, rows)).double()
        total_D += rows_RD.sum(0)
        squares_D += rows_RD.square().sum(0)
    mean_D = total_D / rows
    return mean_D, (squares_D / rows - mean_D.square()).clamp(min=0).sqrt()
