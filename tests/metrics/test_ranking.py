"""Ranking metrics with numbers worked out by hand."""

import pytest

from megatron_ads.metrics.ranking import (
    distinct_rate,
    each_once,
    most_popular,
    ndcg_at,
    position_of,
    recall_at,
    recent_then_popular,
    reciprocal_rank,
    same_name,
    valid_rate,
)

POSITIONS = [1, 3, None, 7]


def test_a_repeated_entry_takes_no_place():
    # Without the second Acme: Acme, Bolt, Corp.
    assert position_of("Corp", ["Acme", "Acme", "Bolt", "Corp"]) == 3
    assert position_of("Dune", ["Acme", "Bolt"]) is None


def test_case_and_white_space_of_a_name_do_not_count():
    assert position_of("Acme  Shoes", ["bolt", " acme shoes "]) == 2


def test_recall_counts_positions_up_to_k():
    assert recall_at(POSITIONS, 1) == 1 / 4
    assert recall_at(POSITIONS, 5) == 2 / 4  # 1 and 3
    assert recall_at(POSITIONS, 20) == 3 / 4
    assert recall_at([], 5) is None


def test_mean_reciprocal_rank_by_hand():
    # (1 + 1/3 + 0 + 1/7) / 4 = (21 + 7 + 3) / 21 / 4 = 31 / 84
    assert reciprocal_rank(POSITIONS) == pytest.approx(31 / 84)


def test_ndcg_of_one_relevant_item_by_hand():
    # 1 / log2(2) = 1, 1 / log2(4) = 0.5, nothing, 1 / log2(8) = 1/3 (beyond 5)
    assert ndcg_at(POSITIONS, 5) == pytest.approx(1.5 / 4)
    assert ndcg_at(POSITIONS, 20) == pytest.approx((1.5 + 1 / 3) / 4)


def test_distinct_and_valid_rates_are_shares_of_entries():
    rankings = [["Acme", "Bolt", "acme"], ["Corp"]]
    assert distinct_rate(rankings) == 3 / 4
    assert valid_rate(rankings, ["ACME", "Corp"]) == 3 / 4  # Bolt does not exist
    assert distinct_rate([]) is None and valid_rate([[]], ["Acme"]) is None


def test_baselines():
    assert most_popular(["b", "a", "c", "b", "a"], 2) == ["a", "b"]
    assert recent_then_popular(["c", "b", "c"], ["a", "b", "d"], 3) == ["c", "b", "a"]


NESTLE = (
    "Nestl\u00e9's",
    "Nestle\u0301's",
    "NESTL\u00c9\u2019S",
    " nestl\u00e9`s ",
    "Nestl\u00e9\u00b4s\u200b",
    "Nestl\u00e9\u02bcs",
)


@pytest.mark.parametrize("other", NESTLE)
def test_a_name_is_one_however_it_is_spelt(other: str):
    name = NESTLE[0]
    assert same_name(other) == same_name(name) != same_name("Nestle's")
    assert each_once([name, other, "\u200b", ""]) == (name,)
    assert position_of(name, ["Acme", "acme", other]) == 2
    assert distinct_rate([[name, other]]) == 0.5
    assert valid_rate([[other]], [name]) == 1.0
    assert most_popular([other, name, name, "Puma", "Puma"], 1) == [name]
    assert recent_then_popular([other], [name, "Puma"], 2) == [other.strip(), "Puma"]


def test_names_are_counted_before_they_are_cut():
    labels = ["Nike"] * 3 + ["NIKE"] * 3 + ["nike "] * 3 + ["Puma"] * 4
    assert most_popular(labels, 1) == ["NIKE"]
    assert most_popular(labels, 2) == ["NIKE", "Puma"]
    assert recent_then_popular(["nike", "Nike"], ["NIKE", "Puma", "Acme"], 3) == ["nike", "Puma", "Acme"]
