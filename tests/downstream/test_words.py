"""Bags of words, by hand: what counts how much, and what a row says of its user."""

import math

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from megatron_ads.downstream.logs import Item
from megatron_ads.downstream.words import Words, history_of, take
from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.user_history import Demographics, Event, EventKind, UserHistory

WORDS = Words(buckets=1 << 16, half_life_days=10.0)


def cosine(one: csr_matrix, other: csr_matrix) -> float:
    return float((one @ other.T).toarray()[0, 0])


def test_lines_of_a_query_count_less_the_later_they_come() -> None:
    # Each line of one word is a word and a whole line: two entries of weight 1 / log2(1 + i).
    both = WORDS.queries(["red\nblue"])
    first, second = 1.0, 1 / math.log2(3)
    length = math.hypot(first, second)
    assert cosine(both, WORDS.queries(["red"])) == pytest.approx(first / length, abs=1e-6)
    assert cosine(both, WORDS.queries(["\n blue"])) == pytest.approx(second / length, abs=1e-6)
    assert WORDS.queries(["", " \n"]).nnz == 0


def test_a_name_in_a_query_is_the_item_of_that_name_however_it_is_spelt() -> None:
    items = WORDS.items([Item("Nor Shoes", "boots"), Item("Shoes Nor", "boots")])
    same, other = (cosine(WORDS.queries(["NOR  shoes"]), items[number]) for number in (0, 1))
    assert same > other > 0


def event(days_ago: float, advertiser: str) -> Event:
    return Event(kind=EventKind.matched_conversion, days_ago=days_ago, text="x", advertiser=advertiser)


def test_events_count_half_after_the_half_life() -> None:
    both = UserHistory(user_id="u", events=(event(0.0, "A"), event(10.0, "B")))
    alone = [UserHistory(user_id="u", events=(event(3.0, name),)) for name in ("A", "B")]
    bags = WORDS.histories([both, *alone])
    length = math.hypot(1.0, 0.5)
    found = [cosine(bags[0], bags[number]) for number in (1, 2)]
    assert found == pytest.approx([1 / length, 0.5 / length], abs=1e-6)


def row(**facts: object) -> ChatRow:
    return ChatRow(id="r", task="t", messages=(), group="u", facts=facts)  # type: ignore[arg-type]


def test_a_row_says_what_its_user_did_by_events_or_by_what_its_prompt_shows() -> None:
    bought = {"kind": "matched_conversion", "days_ago": 2, "text": "x", "advertiser": "A"}
    told = history_of(row(**{Fact.events: [bought], Fact.demographics: {"age": "18-24"}}))
    assert told == UserHistory(user_id="u", events=(event(2.0, "A"),), demographics=Demographics(age="18-24"))
    shown = history_of(row(**{Fact.history: {"past_advertisers": ["A"], "top_brands": ["B"], "clicks": ["shoe"]}}))
    assert [(each.advertiser, each.brand, each.text) for each in shown.events] == [
        ("A", "", ""),
        ("", "B", ""),
        ("", "", "shoe"),
    ]
    assert history_of(row()).events == ()


@pytest.mark.parametrize("fact", [{"kind": "click"}, {"kind": "sale", "days_ago": 1, "text": "x"}, "click"])
def test_an_event_that_is_none_is_named_with_its_row(fact: object) -> None:
    with pytest.raises(DataError, match=r"row 'r': .* is no event"):
        history_of(row(**{Fact.events: [fact]}))


def test_rows_that_are_not_kept_are_empty() -> None:
    bags = take(WORDS.queries(["a", "b", "c"]), [2, 0], np.array([True, False]))
    assert bags.shape[0] == 2
    assert cosine(bags[0], WORDS.queries(["c"])) == pytest.approx(1.0)
    assert bags[1].sum() == 0
