"""Shares of answers in the right form, and how far two sets agree."""

import pytest

from megatron_ads.metrics.format_rates import format_rates
from megatron_ads.metrics.overlap import Overlap, overlap


def test_format_rates_by_hand():
    texts = [
        "<think>why</think>Acme",  # all three
        "<think> </think>Acme",  # an empty block
        "<think>why</think> ",  # no answer
        "<think>why",  # never closed
        "Acme",
    ]
    assert format_rates(texts) == {
        "think_tag_presence_rate": 3 / 5,
        "think_non_empty_rate": 2 / 5,
        "answer_non_empty_rate": 2 / 5,
    }
    assert set(format_rates([]).values()) == {None}


def test_overlap_by_hand():
    # 2 of the 3 predicted are true, 2 of the 4 true are predicted: F1 = 2 * (2/3) * (1/2) / (2/3 + 1/2) = 4/7
    found = overlap(["Shoes", "hats", "bags", "coats"], ["shoes ", "HATS", "toys"])
    assert (found.precision, found.recall) == (2 / 3, 1 / 2)
    assert found.f1 == pytest.approx(4 / 7)


def test_empty_sets():
    assert overlap([], []) == Overlap(1.0, 1.0)
    assert overlap(["a"], []).f1 == 0.0
    assert overlap([], ["a"]).f1 == 0.0
