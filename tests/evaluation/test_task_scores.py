"""Scores of several tasks together."""

import pytest

from megatron_ads.errors import DataError
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.task_scores import task_scores
from megatron_ads.rows import ChatRow, Message, Role
from megatron_ads.tasks import ad_user_relevance, relevance
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Label
from megatron_ads.tasks.user_history import Event, EventKind, UserHistory


def _graded(number: int, given: int) -> Answer:
    user = UserHistory(
        user_id=f"u{number // 2}", events=(Event(kind=EventKind.onsite_search, days_ago=1, text="shoes"),)
    )
    row = ad_user_relevance.chat_row(f"g{number}", user, Ad(title="Shoes"), number % 4, "They look for shoes.")
    said = ad_user_relevance.chat_row("x", user, Ad(title="Shoes"), given, "They look for shoes.")
    return Answer(row, said.target, ended=True)


def _judged(label: Label, given: Label) -> Answer:
    row = relevance.chat_row("r", "q", Ad(title="a"), label, "because")
    said = relevance.chat_row("x", "q", Ad(title="a"), given, "because")
    return Answer(row, said.target, ended=True)


def test_each_task_has_its_own_scores_and_baseline() -> None:
    judged = [_judged(Label.bad, Label.bad), _judged(Label.good, Label.bad)]
    graded = [_graded(number, number % 4) for number in range(8)]
    training = [judged[0].row, *(answer.row for answer in graded)]
    scores = task_scores([*graded, *judged], training)
    assert sorted(scores) == ["ad_user_relevance", "query_ad_relevance"]
    assert scores["query_ad_relevance"]["baseline_label"] == "Bad"
    assert scores["query_ad_relevance"]["accuracy"] == 0.5
    of_users = scores["ad_user_relevance"]
    assert (of_users["rows"], of_users["groups"], of_users["readable_share"]) == (8, 4, 1.0)
    assert of_users["headline"] == 1.0
    assert of_users["headline_95"] == [1.0, 1.0]


def test_the_interval_of_the_headline_holds_it() -> None:
    answers = [_graded(number, 3 if number % 3 else number % 4) for number in range(24)]
    scores = task_scores(answers, [])["ad_user_relevance"]
    low, high = scores["headline_95"]
    assert low < scores["headline"] < high


def test_a_task_that_nobody_knows_is_refused() -> None:
    row = ChatRow("7", "arithmetic", (Message(Role.user, "1+1"), Message(Role.assistant, "2")))
    with pytest.raises(DataError, match="there is no task 'arithmetic'"):
        task_scores([Answer(row, "2", ended=True)], [])
