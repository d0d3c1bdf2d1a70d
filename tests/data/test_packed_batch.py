"""Packing: nothing lost, nothing split, rows well filled."""

import random

import pytest

from megatron_ads.data.packed_batch import pack, pack_prefix


def test_longest_first_each_where_it_leaves_least_room():
    # 7 -> row 0 (room 3), 5 -> row 1 (room 5), 4 -> row 1 (room 1), 3 -> row 0 (room 0), 1 -> row 1 (room 0).
    assert pack([3, 7, 1, 5, 4], capacity=10, rows=2) == [[0, 1], [2, 3, 4]]


def test_what_does_not_fit_is_none():
    assert pack([6, 6, 6], capacity=10, rows=2) is None
    assert pack([11], capacity=10, rows=2) is None


def test_rows_may_stay_empty():
    assert sorted(pack([1], capacity=10, rows=3) or []) == [[], [], [0]]


@pytest.mark.parametrize("seed", range(5))
def test_prefix_is_packed_whole_and_within_capacity(seed: int):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 64) for _ in range(300)]
    packed = pack_prefix(lengths, capacity=64, rows=16)
    placed = sorted(index for row in packed for index in row)
    assert placed == list(range(len(placed)))  # a prefix, each sample once
    assert all(sum(lengths[index] for index in row) <= 64 for row in packed)
    assert len(packed) == 16
    assert sum(lengths[index] for index in placed) / (16 * 64) > 0.9


def test_what_follows_the_prefix_plays_no_part():
    draw = random.Random(0)
    lengths = [draw.randint(1, 64) for _ in range(300)]
    packed = pack_prefix(lengths, capacity=64, rows=8)
    used = sum(len(row) for row in packed)
    enough = next(count for count in range(len(lengths)) if sum(lengths[:count]) > 64 * 8)
    assert used < enough
    assert pack_prefix(lengths[:enough], capacity=64, rows=8) == packed


def test_samples_that_fill_a_row_each_take_one_row():
    assert pack_prefix([64] * 10, capacity=64, rows=4) == [[0], [1], [2], [3]]
