"""The computed order is a permutation, differs between keys, and never changes."""

from itertools import pairwise

import pytest

from megatron_ads.data.shuffle import key_of, mix, shuffled


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_every_item_comes_up_exactly_once(size: int):
    assert sorted(shuffled(place, size, key_of(7)) for place in range(size)) == list(range(size))


def test_mixing_is_splitmix64():
    # First outputs of SplitMix64 from state 0 and state 1234567, as published with the reference implementation.
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1234567) == 6457827717110365317


def test_order_is_frozen():
    # A changed order would silently change which samples a resumed job sees.
    assert [shuffled(place, 10, key_of(0, 0, 0)) for place in range(10)] == [1, 4, 9, 2, 8, 6, 7, 0, 5, 3]


def test_keys_give_different_orders():
    orders = {tuple(shuffled(place, 50, key_of(0, source, epoch)) for place in range(50))
              for source in range(3) for epoch in range(3)}  # fmt: skip
    assert len(orders) == 9


def test_order_looks_random():
    # Of 10,000 items about half move up; neighbours stay neighbours about twice (chance 2 / n for each of n pairs).
    size, key = 10_000, key_of(5)
    order = [shuffled(place, size, key) for place in range(size)]
    assert 0.48 < sum(item > place for place, item in enumerate(order)) / size < 0.52
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 15
