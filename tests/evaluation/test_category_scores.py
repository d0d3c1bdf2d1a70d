"""Categories of names come from what users did with them; accuracies go as deep as true names have levels."""

from dataclasses import replace

import pytest

from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.category_scores import categories_of_names, category_scores
from megatron_ads.evaluation.ranking_scores import ranking_scores
from megatron_ads.inference.name_answers import AdvertiserNames
from megatron_ads.rows import ChatRow, Fact
from tests.evaluation.advertiser_rows import name_row


def _row(row_id: str, label: str, *bought: tuple[str, str]) -> ChatRow:
    events = [{"kind": "click", "days_ago": 1, "advertiser": name, "category": of} for name, of in bought]
    row = name_row(row_id, label)
    return replace(row, facts={**row.facts, Fact.events: events})


HISTORY = _row(
    "h", "A",
    ("A", "Home > Kitchen > Knives"), ("A", "Home > Kitchen > Knives"), ("A", "Toys"),
    ("B", "home > kitchen > Pans"), ("C", "Home > Garden"), ("D", "Toys"), ("E", ""),
)  # fmt: skip
CATEGORIES = categories_of_names([HISTORY])


def test_a_names_category_is_the_most_frequent_one() -> None:
    assert CATEGORIES["a"] == ("home", "kitchen", "knives")
    assert set(CATEGORIES) == {"a", "b", "c", "d"}


def test_each_level_is_judged_where_the_true_name_has_it() -> None:
    rows = [_row(str(number), label) for number, label in enumerate(["A", "A", "A", "C", "D", "unknown"])]
    rankings = [["B"], ["C", "A"], [], ["A"], ["Z"], ["A"]]
    scores = category_scores(rows, rankings, CATEGORIES)
    # L1: B, C for A; A for C are of Home, nothing and Z are not; L2: of A, A, A, C only B for A; L3: none of three.
    assert [scores[f"category L{level}"] for level in (1, 2, 3)] == [3 / 5, 1 / 4, 0.0]


def test_without_categories_there_are_none() -> None:
    assert category_scores([name_row("1", "A")], [["A"]], {}) == {}


def test_every_method_of_a_ranking_has_them() -> None:
    answers = [Answer(_row("1", "A", ("A", "Home"), ("B", "Home")), "B", True)]
    methods = ranking_scores(answers, [_row("2", "Z", ("Z", "Toys"))], AdvertiserNames(("A", "B", "Z"), "here"))[
        "methods"
    ]
    assert methods["model"]["category L1"] == 1.0
    assert methods["popular"]["category L1"] == 0.0


def test_the_nearest_titles_have_hit_rates_at_50_and_100() -> None:
    names = AdvertiserNames(tuple(f"knife number {number}" for number in range(150)), "here")
    answers = [Answer(name_row("1", "knife number 7"), "knife number 7!", True)]
    methods = ranking_scores(answers, [name_row("2", "knife number 1")], names, ground=True)["methods"]
    nearest = methods["model, nearest names"]
    assert [nearest[name] for name in ("recall@1", "hr@50", "hr@100")] == pytest.approx([1.0, 1.0, 1.0])
