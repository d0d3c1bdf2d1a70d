"""Weighted sources: shares, epochs, and going back and on."""

from collections import Counter

import pytest

from megatron_ads.data.mixing import Mixture, WeightedRows
from megatron_ads.errors import DataError
from tests.data.rows import rows


def names(mixture: Mixture, count: int) -> list[str]:
    return [mixture.draw().row.id for _ in range(count)]


def test_every_prefix_holds_the_shares_to_within_a_sample():
    mixture = Mixture([WeightedRows(rows(50), 3.0), WeightedRows(rows(50), 1.0), WeightedRows(rows(9), 1.0)], seed=0)
    drawn: Counter[int] = Counter()
    for count in range(1, 500):
        drawn[mixture.draw().source] += 1
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
    assert [each.row.id for each in drawn if each.source == 0] != [each.row.id for each in drawn if each.source == 1]


def test_what_is_put_back_comes_again():
    mixture = Mixture([WeightedRows(rows(20), 2.0), WeightedRows(rows(20), 1.0)], seed=0)
    names(mixture, 7)
    drawn = [mixture.draw() for _ in range(9)]
    mixture.put_back([each.source for each in drawn[4:]])
    again = [mixture.draw() for _ in range(5)]
    assert again == drawn[4:]


def test_a_source_without_rows_is_named():
    with pytest.raises(DataError, match="no rows to train on in clicks"):
        Mixture([WeightedRows(rows(2)), WeightedRows([], name="clicks")], seed=0)
    with pytest.raises(DataError, match=r"data\.sources"):
        Mixture([], seed=0)


def test_a_row_is_numbered_through_all_sources():
    mixture = Mixture([WeightedRows(rows(3)), WeightedRows(rows(2, prefix="s"))], seed=0)
    numbered = {draw.row.id: draw.number for draw in (mixture.draw() for _ in range(10))}
    assert numbered == {"r0": 0, "r1": 1, "r2": 2, "s0": 3, "s1": 4}


def adaptive_mixture() -> Mixture:
    sources = [
        WeightedRows(rows(30), 1.0, adaptive_task="relevance"),
        WeightedRows(rows(30), 1.0, adaptive_task="profile"),
        WeightedRows(rows(30), 2.0, name="general"),
    ]
    return Mixture(sources, seed=0)


def shares_of_next(mixture: Mixture, count: int) -> list[float]:
    drawn = Counter(mixture.draw().source for _ in range(count))
    return [drawn[source] / count for source in range(3)]


def test_adapted_shares_divide_what_the_adaptive_tasks_have_and_leave_the_rest():
    mixture = adaptive_mixture()
    assert shares_of_next(mixture, 40) == [0.25, 0.25, 0.5]
    # Of the half that both tasks have together, 0.8 and 0.2.
    assert mixture.adapt({"relevance": 0.8, "profile": 0.2}) == pytest.approx({"relevance": 0.4, "profile": 0.1})
    assert shares_of_next(mixture, 100) == pytest.approx([0.4, 0.1, 0.5])


def test_new_shares_do_not_make_up_for_what_was_drawn_before():
    mixture = adaptive_mixture()
    names(mixture, 400)
    mixture.adapt({"relevance": 0.98, "profile": 0.02})
    assert shares_of_next(mixture, 50)[1] == pytest.approx(0.01, abs=0.02)  # counted from the start: none for long


def test_a_changed_weight_scales_adapted_shares():
    one, other = adaptive_mixture(), adaptive_mixture()
    one.adapt({"relevance": 0.9, "profile": 0.1})
    state = one.state_dict()
    state["source_weights"][0] *= 2  # it was twice as much before
    other.load_state_dict(state)
    halved = [one._shares[0] / 2, *one._shares[1:]]
    assert other._shares == pytest.approx([share / sum(halved) for share in halved])


def test_adapted_shares_are_resumed():
    one, other = adaptive_mixture(), adaptive_mixture()
    names(one, 7)
    one.adapt({"relevance": 0.9, "profile": 0.1})
    names(one, 5)
    other.load_state_dict(one.state_dict())
    assert names(one, 60) == names(other, 60)
