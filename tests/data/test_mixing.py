"""Weighted sources: shares, epochs, and going back and on."""

from collections import Counter

import pytest

from megatron_ads.data.mixing import Mixture, WeightedRows
from megatron_ads.errors import DataError
from tests.data.rows import rows


def names(mixture: Mixture, count: int) -> list[str]:
    return [mixture.draw()[1].id for _ in range(count)]


def test_every_prefix_holds_the_shares_to_within_a_sample():
    mixture = Mixture([WeightedRows(rows(50), 3.0), WeightedRows(rows(50), 1.0), WeightedRows(rows(9), 1.0)], seed=0)
    drawn: Counter[int] = Counter()
    for count in range(1, 500):
        drawn[mixture.draw()[0]] += 1
        for source, share in ((0, 0.6), (1, 0.2), (2, 0.2)):
            assert abs(drawn[source] - share * count) <= 1


def test_an_epoch_of_a_source_has_each_row_once_and_the_next_another_order():
    drawn = names(Mixture([WeightedRows(rows(40))], seed=0), 80)
    assert sorted(drawn[:40]) == sorted(drawn[40:]) == sorted(row.id for row in rows(40))
    assert drawn[:40] != drawn[40:]


def test_seed_decides_the_order():
    source = [WeightedRows(rows(40))]
    assert names(Mixture(source, seed=1), 40) == names(Mixture(source, seed=1), 40)
    assert names(Mixture(source, seed=1), 40) != names(Mixture(source, seed=2), 40)


def test_sources_of_the_same_rows_have_different_orders():
    mixture = Mixture([WeightedRows(rows(40)), WeightedRows(rows(40))], seed=0)
    drawn = [mixture.draw() for _ in range(80)]
    assert [row.id for source, row in drawn if source == 0] != [row.id for source, row in drawn if source == 1]


def test_what_is_put_back_comes_again():
    mixture = Mixture([WeightedRows(rows(20), 2.0), WeightedRows(rows(20), 1.0)], seed=0)
    names(mixture, 7)
    drawn = [mixture.draw() for _ in range(9)]
    mixture.put_back([source for source, _ in drawn[4:]])
    again = [mixture.draw() for _ in range(5)]
    assert [(source, row.id) for source, row in again] == [(source, row.id) for source, row in drawn[4:]]


def test_a_source_without_rows_is_named():
    with pytest.raises(DataError, match="no rows to train on in clicks"):
        Mixture([WeightedRows(rows(2)), WeightedRows([], name="clicks")], seed=0)
    with pytest.raises(DataError, match=r"data\.sources"):
        Mixture([], seed=0)
