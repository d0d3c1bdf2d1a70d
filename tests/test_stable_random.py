"""Draws keyed by names never change; the computed order is a permutation and differs between keys.

A changed draw would silently hold out other rows, ask other questions and repeat paid requests: the values of every
caller are frozen.
"""

from itertools import pairwise

import pytest

from megatron_ads.stable_random import key_of, mix, shuffled, stable_integer, stable_key
from megatron_ads.synthesis import prompts
from megatron_ads.tasks.advertiser_question import candidates_of
from megatron_ads.tasks.prompts import Template


def test_split_of_the_data_is_frozen():
    assert stable_key(7, "row 1").hex() == "cab9a50d54a8125a48128e04fbd084a1481cd9690c5c4e7ca580555c3ee22b40"


def test_draws_of_requests_are_frozen_and_take_any_text():
    assert prompts.drawn(7, "row 1", "reason/1", 2) == 2626976049207517253
    assert prompts.drawn(1, "\ud800") == 8887914303918060660


def test_wordings_are_frozen():
    template = Template(task="t", version=1, paraphrases=tuple("abcdefg"))
    assert [template.wording_of(f"row {number}") for number in range(8)] == [2, 1, 3, 2, 2, 3, 4, 3]


def test_candidates_are_frozen():
    assert candidates_of("row 1", "a", list("abcdefghij"), 5) == ("d", "i", "a", "f", "h")


def test_seeds_of_adapters_and_of_sampled_answers_are_frozen():
    assert stable_integer(7, "decoder.x", separator=" ") >> 8 == 38227841642678370
    assert stable_integer(7, 3) == 1232913860685451959


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
