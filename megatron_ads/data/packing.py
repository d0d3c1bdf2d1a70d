"""Fit samples into rows of fixed length: best-fit decreasing, deterministic, no sample is ever split."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], *, capacity: int, rows: int) -> list[list[int]] | None:
    """Place samples into ``rows`` rows of ``capacity``, the longest first, each where it leaves least room.

    Returns:
        The indices of the samples of each row, ascending (a row may be empty); None if they do not fit.
    """
    room = [(capacity, row) for row in range(rows)]  # kept ascending
    placed: list[list[int]] = [[] for _ in range(rows)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect_left(room, (lengths[index], -1))
        if found == len(room):
            return None
        left, row = room.pop(found)
        insort(room, (left - lengths[index], row))
        placed[row].append(index)
    return [sorted(row) for row in placed]


def pack_prefix(lengths: Sequence[int], *, capacity: int, rows: int) -> list[list[int]]:
    """Pack as many samples from the front as fit into ``rows`` rows; no length may exceed ``capacity``.

    The prefix is found by bisection between one sample a row, which always fits, and the sum of the lengths.

    Returns:
        As :func:`pack`, for samples 0, 1, ... up to some number; the others are left for the next call.
    """
    low, high = min(rows, len(lengths)), _longest_by_sum(lengths, capacity * rows)
    best = pack(lengths[:low], capacity=capacity, rows=rows)
    while low < high:
        middle = (low + high + 1) // 2
        tried = pack(lengths[:middle], capacity=capacity, rows=rows)
        if tried is None:
            high = middle - 1
        else:
            low, best = middle, tried
    assert best is not None, "one sample a row always fits"
    return best


def _longest_by_sum(lengths: Sequence[int], limit: int) -> int:
    total = 0
    for count, length in enumerate(lengths):
        total += length
        if total > limit:
            return count
    return len(lengths)
