import pytest

from megatron_ads.evaluation.name_answers import CollaborativeModel
from tests.evaluation.advertiser_rows import name_row

TRAINING = [
    name_row("1", "A", ["B"]),
    name_row("2", "A", ["B", "C"]),
    name_row("3", "B", ["B"]),
    name_row("4", "Elsewhere", ["C"]),
]
NAMES = ("A", "B", "C")


def test_chances_worked_out_by_hand() -> None:
    # popular: A 2, B 1, C 0, plus one each -> 3/6, 2/6, 1/6.  After B: A 2, B 1 of 3.  After C: A 1 of 1 valid label.
    chances = CollaborativeModel(TRAINING).chances(name_row("5", "A", ["b", "C", "Unknown"]), NAMES)
    after = [(2 / 3 + 1) / 2, (1 / 3) / 2, 0.0]
    expected = [(popular + later) / 2 for popular, later in zip([3 / 6, 2 / 6, 1 / 6], after, strict=True)]
    assert chances.tolist() == pytest.approx(expected)
    assert chances.sum() == pytest.approx(1.0)


def test_without_a_known_past_what_is_popular_counts_alone() -> None:
    model = CollaborativeModel(TRAINING)
    for past in ([], ["Unknown"], ["A"]):  # nobody who had bought from A is among the rows
        chances = model.chances(name_row("5", "A", past), NAMES)
        assert chances.tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6])


def test_chances_are_of_the_names_asked_for() -> None:
    chances = CollaborativeModel(TRAINING).chances(name_row("5", "A", ["B"]), ("B", "New"))
    # popular: B 1, New 0, plus one each -> 2/3, 1/3.  After B: B alone.
    assert chances.tolist() == pytest.approx([(2 / 3 + 1) / 2, (1 / 3) / 2])
