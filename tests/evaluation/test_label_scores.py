from dataclasses import replace

import pytest

from megatron_ads.errors import DataError
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.label_scores import relevance_scores
from megatron_ads.rows import ChatRow, Fact, Message, Role
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Label, chat_row

UNREADABLE = {ReadFailure.no_label: "<think>r</think>", ReadFailure.empty: ""}


def _answer(expected: Label, given: Label | ReadFailure, query: str = "q") -> Answer:
    text = (
        UNREADABLE[given] if isinstance(given, ReadFailure) else chat_row("1", query, Ad(title="a"), given, "r").target
    )
    row = chat_row("1", query, Ad(title="a"), expected, "r")
    return Answer(row=row, text=text, ended=given is not ReadFailure.empty)


def _labelled(*labels: str) -> list[ChatRow]:
    return [chat_row(str(n), "q", Ad(title="a"), Label(label), "r") for n, label in enumerate(labels)]


ANSWERS = [
    _answer(Label.bad, Label.bad, "a"),
    _answer(Label.bad, Label.fair, "a"),
    _answer(Label.fair, Label.good, "b"),
    _answer(Label.good, Label.good, "c"),
    _answer(Label.good, ReadFailure.no_label, "c"),
    _answer(Label.good, ReadFailure.empty, "d"),
]


def test_scores_worked_out_by_hand() -> None:
    scores = relevance_scores(ANSWERS, training=_labelled("Good", "Good", "Bad"))
    assert (scores["rows"], scores["queries"]) == (6, 4)
    assert scores["accuracy"] == pytest.approx(2 / 6)  # the first and the fourth
    assert scores["readable_share"] == pytest.approx(4 / 6)
    assert scores["ended_share"] == pytest.approx(5 / 6)
    assert scores["unreadable_because"] == {"no_label": 1, "empty": 1}
    # bad against the rest: 1 of 2 bad found, 2 of 4 others called fair or good -> (1/2 + 2/4) / 2
    assert scores["views"]["bad"]["model"]["balanced_accuracy"] == pytest.approx(0.5)
    # good against the rest: 1 of 3 good; of bad, bad, fair the third is called good -> (1/3 + 2/3) / 2
    assert scores["views"]["fair"]["model"]["balanced_accuracy"] == pytest.approx(0.5)


def test_the_baseline_is_the_commonest_label_of_the_training_rows() -> None:
    scores = relevance_scores(ANSWERS, training=_labelled("Fair", "Fair", "Good"))
    assert scores["baseline_label"] == "Fair"
    assert scores["baseline_accuracy"] == pytest.approx(1 / 6)
    assert scores["views"]["bad"]["baseline"]["balanced_accuracy"] == 0.5


def test_perfect_answers_score_one_and_unreadable_ones_zero() -> None:
    perfect = [_answer(label, label) for label in Label]
    unreadable = [_answer(label, ReadFailure.empty) for label in Label]
    for answers, expected in ((perfect, 1.0), (unreadable, 0.0)):
        scores = relevance_scores(answers, training=_labelled("Good"))
        assert scores["accuracy"] == expected
        assert scores["views"]["bad"]["model"]["balanced_accuracy"] == expected


def test_the_interval_holds_the_value() -> None:
    view = relevance_scores(ANSWERS, training=_labelled("Good"))["views"]["bad"]
    low, high = view["balanced_accuracy_95"]
    assert low <= view["model"]["balanced_accuracy"] <= high


def test_rows_without_a_query_are_together_where_they_ask_the_same() -> None:
    asked = [(Message(Role.user, f"ad {number}"), answer.row.messages[-1]) for number, answer in enumerate(ANSWERS)]
    answers = [
        replace(answer, row=replace(answer.row, id=str(number), group="", messages=asked[number]))
        for number, answer in enumerate(ANSWERS)
    ]
    scores = relevance_scores(answers, training=_labelled("Good"))
    assert scores["queries"] == 6
    low, high = scores["views"]["bad"]["balanced_accuracy_95"]
    assert low < high  # of one query alone, every resample would be the same
    twins = [replace(answer, row=replace(answer.row, messages=asked[0])) for answer in answers]
    scores = relevance_scores(twins, training=_labelled("Good"))
    assert (scores["queries"], scores["views"]["bad"]["balanced_accuracy_95"]) == (1, None)


def test_a_row_of_another_task_or_label_is_refused() -> None:
    answer = ANSWERS[0]
    with pytest.raises(DataError, match="row '1' is of task 'arithmetic'"):
        relevance_scores([replace(answer, row=replace(answer.row, task="arithmetic"))], training=_labelled("Good"))
    with pytest.raises(DataError, match="with label 'Superb'"):
        relevance_scores([replace(answer, row=replace(answer.row, label="Superb"))], training=_labelled("Good"))


def test_the_best_reachable_is_judged_where_every_row_has_a_best_answer() -> None:
    best = [["Bad", "Fair"], ["Fair"], ["Good"], ["Good"], ["Good"], ["Bad"]]
    answers = [  # bad, bad, fair, good, good, good
        replace(answer, row=replace(answer.row, facts={**answer.row.facts, Fact.best_answers: given}))
        for answer, given in zip(ANSWERS, best, strict=True)
    ]
    views = relevance_scores(answers, training=_labelled("Good"))["views"]
    # bad against the rest: 1 of 2 bad, 3 of 4 others; good against the rest: 2 of 3 good, 2 of 3 others
    assert views["bad"]["reachable"]["balanced_accuracy"] == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert views["fair"]["reachable"]["balanced_accuracy"] == pytest.approx(2 / 3)
    partly = [answers[0], ANSWERS[1]]
    assert "reachable" not in relevance_scores(partly, training=_labelled("Good"))["views"]["bad"]


def test_the_text_baseline_learns_from_the_words_of_training_rows() -> None:
    words = {Label.bad: "grey", Label.fair: "green", Label.good: "golden"}
    training = [chat_row(f"{label}{n}", f"{word} thing {n}", Ad(title="a"), label, "r")
                for label, word in words.items() for n in range(5)]  # fmt: skip
    answers = [
        Answer(row=chat_row(label, f"{word} object", Ad(title="a"), label, "r"), text="", ended=True)
        for label, word in words.items()
    ]
    views = relevance_scores(answers, training=training)["views"]
    assert [view["text_baseline"]["balanced_accuracy"] for view in views.values()] == [1.0, 1.0]
    assert "text_baseline" not in relevance_scores(answers, training=training[:5])["views"]["bad"]
