from pathlib import Path

import pytest

from megatron_ads.errors import DataError
from megatron_ads.evaluation.name_answers import bought_from, names_trained_on, read_names, valid_names
from megatron_ads.tasks import advertiser_question, relevance
from megatron_ads.tasks.advertiser_question import question_of
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
    chosen = advertiser_question.choose_one_row(question_of(row, "2", [f"name {number}" for number in range(30)]))
    listed = valid_names(chosen, advertisers)
    assert listed is not None
    assert (len(listed), "Cord" in listed) == (20, True)
    assert valid_names(relevance.chat_row("r", "q", Ad(title="a"), Label.bad, "because"), advertisers) is None


def test_a_file_of_names_is_read_a_name_a_line_each_once(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("Acme\n\n  Bolt Works \nACME\nbolt  works\n")
    assert read_names(file).names == ("Acme", "Bolt Works")


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
