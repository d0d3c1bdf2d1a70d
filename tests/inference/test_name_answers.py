"""Names as answers: which are valid, which are nearest to a text, and whom others bought from."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ads.errors import DataError
from megatron_ads.inference.name_answers import (
    CollaborativeModel,
    NearestNames,
    bought_from,
    names_trained_on,
    read_names,
    valid_names,
)
from megatron_ads.rows import Fact
from megatron_ads.tasks import advertiser_question, relevance
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Label
from tests.evaluation.advertiser_rows import name_row


def test_the_names_of_training_rows_are_their_truths_and_whom_users_bought_from() -> None:
    judged = relevance.chat_row("r", "q", Ad(title="a"), Label.bad, "because")
    training = [
        name_row("1", "Acme", ["Bolt", "Cord"]),
        name_row("2", "acme "),
        name_row("3", "Dune", ["bolt"]),
        judged,
    ]
    assert names_trained_on(training).names == ("Acme", "Dune", "Bolt", "Cord")


def test_whom_a_user_bought_from_is_read_from_the_prompt_newest_first() -> None:
    assert bought_from(name_row("1", "Acme", ["Bolt", "Cord", "Bolt"])) == ("Bolt", "Cord")
    assert bought_from(name_row("1", "Acme")) == ()


def test_each_task_has_its_own_valid_names() -> None:
    advertisers = names_trained_on([name_row("1", "Acme", ["Bolt"])])
    row = name_row("2", "Cord")
    assert valid_names(row, advertisers) == ("Acme", "Bolt")
    chosen = advertiser_question.choose_one_row(row, "2", [f"name {number}" for number in range(30)])
    listed = valid_names(chosen, advertisers)
    assert listed is not None
    assert (len(listed), "Cord" in listed) == (20, True)
    assert valid_names(relevance.chat_row("r", "q", Ad(title="a"), Label.bad, "because"), advertisers) is None


def test_a_file_of_names_is_read_a_name_a_line_each_once(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text(
        "Acme\n\n  Bolt Works \nACME\nbolt  works\nNestl\u00e9\nNestle\u0301\nacme\u200b\n", encoding="utf-8"
    )
    assert read_names(file).names == ("Acme", "Bolt Works", "Nestl\u00e9")


def test_a_list_of_a_rows_own_names_each_once() -> None:
    row = advertiser_question.choose_one_row(name_row("1", "Acme"), "1", [f"name {number}" for number in range(30)])
    twins = replace(row, facts={**row.facts, Fact.candidates: ["Acme", "ACME", "Bolt", "acme\u200b"]})
    assert valid_names(twins, names_trained_on([])) == ("Acme", "Bolt")


def test_a_file_without_names_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    with pytest.raises(DataError, match=r"names\.txt cannot be read \(No such file"):
        read_names(file)
    file.write_text(" \n")
    with pytest.raises(DataError, match="holds no names; --names takes"):
        read_names(file)
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_names(file)


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


SHOPS = ("Acme Tools", "Acme Paper", "Bolt & Sons", "Dune", "Dunes End")


def test_every_name_is_nearest_to_itself() -> None:
    ranked = NearestNames(SHOPS).rank(SHOPS, 5)
    assert [names[0] for names in ranked] == list(SHOPS)
    assert all(sorted(names) == sorted(SHOPS) for names in ranked)


def test_a_name_spelt_otherwise_or_told_in_a_sentence_is_found() -> None:
    nearest = NearestNames(SHOPS)
    ranked = nearest.rank(["ACME  tool", "Bolt and Sons", "They buy from Dunes End next."], 1)
    assert ranked == [["Acme Tools"], ["Bolt & Sons"], ["Dunes End"]]


def test_what_has_nothing_in_common_with_any_name_is_not_grounded() -> None:
    assert NearestNames(SHOPS).rank(["xyz", ""], 3) == [[], []]
