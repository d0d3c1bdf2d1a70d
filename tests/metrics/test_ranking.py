"""Ranking metrics with numbers worked out by hand, and NDCG against scikit-learn."""

import math
import random

import pytest
from sklearn.metrics import ndcg_score

from megatron_ads.metrics.ranking import (
    category_accuracy,
    distinct_rate,
    graded_ndcg,
    most_popular,
    ndcg_at,
    position_of,
    recall_at,
    recall_of,
    recent_then_popular,
    reciprocal_rank,
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


def test_graded_ndcg_by_hand_and_against_scikit_learn():
    # Gains 1, 3, 2: DCG = 1 + 3 / log2(3) + 2 / 2; best order 3, 2, 1: 3 + 2 / log2(3) + 1 / 2
    expected = (2 + 3 / math.log2(3)) / (3.5 + 2 / math.log2(3))
    assert graded_ndcg([1, 3, 2], 3) == pytest.approx(expected)
    draw = random.Random(0)
    for k in (1, 5, 10):
        gains = [draw.randint(0, 3) for _ in range(10)]
        scores = [list(range(10, 0, -1))]
        assert graded_ndcg(gains, k) == pytest.approx(ndcg_score([gains], scores, k=k))
    assert graded_ndcg([0, 0], 2) is None


def test_recall_of_several_relevant_items():
    # Of a, b, c the first two entries (the repeated a counts once) hold a and c.
    assert recall_of({"a", "b", "c"}, ["a", "a", "c", "b"], 2) == pytest.approx(2 / 3)
    assert recall_of(set(), ["a"], 1) is None


def test_distinct_and_valid_rates_are_shares_of_entries():
    rankings = [["Acme", "Bolt", "acme"], ["Corp"]]
    assert distinct_rate(rankings) == 3 / 4
    assert valid_rate(rankings, ["ACME", "Corp"]) == 3 / 4  # Bolt does not exist
    assert distinct_rate([]) is None and valid_rate([[]], ["Acme"]) is None


def test_category_accuracy_needs_the_whole_path_down_to_the_level():
    truths = [("Home", "Bed", "Sheets"), ("Home", "Bath"), ("Toys", "Cars", "Race")]
    predictions = [("Home", "Bed", "Pillows"), ("Home", "Bath"), None]
    assert category_accuracy(truths, predictions, 1) == pytest.approx(2 / 3)
    assert category_accuracy(truths, predictions, 2) == pytest.approx(2 / 3)
    assert category_accuracy(truths, predictions, 3) == 0.0  # the second path ends at level 2


def test_baselines():
    assert most_popular(["b", "a", "c", "b", "a"], 2) == ["a", "b"]
    assert recent_then_popular(["c", "b", "c"], ["a", "b", "d"], 3) == ["c", "b", "a"]
