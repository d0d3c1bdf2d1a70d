"""Ad-user relevance: the scale, the strict parser, table 5."""

import pytest

from megatron_ads.errors import DataError
from megatron_ads.tasks.ad_user_relevance import TEMPLATE, Score, UserRelevanceJudgement, chat_row, metrics, parse
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.user_history import HistoryView, Section, UserHistory
from tests.tasks.examples import RUNNER, SHOES


def test_prompt_shows_history_and_ad():
    lines = chat_row("r", RUNNER, SHOES, 3, "So.").prompt[0].content.splitlines()
    assert lines[0] == TEMPLATE.instruction_of("r")
    assert TEMPLATE.instruction().startswith("How relevant is the ad to this user? Answer with <Score>")
    assert lines[1] == "Bought from: Shop 2; Shop 7"
    assert lines[-2:] == ["Ad: Lightweight running shoes for new runners", "Text: Comfortable and cushioned."]


def test_a_user_without_history_is_said_to_be_unknown():
    assert "Nothing is known of the user." in chat_row("r", UserHistory(user_id="u"), SHOES, 0, "So.").prompt[0].content


def test_an_ablated_section_is_not_in_the_prompt():
    view = HistoryView(without=frozenset({Section.clicks}))
    full, ablated = (chat_row("r", RUNNER, SHOES, 3, "So.", view=v).prompt[0].content for v in (HistoryView(), view))
    assert [line for line in full.splitlines() if line not in ablated.splitlines()] == [
        "Clicked: how to choose running shoes"
    ]


def test_a_row_is_grouped_by_user_and_labelled_with_its_score():
    row = chat_row("r", RUNNER, SHOES, Score.high, "All about running.")
    assert (row.group, row.label) == ("u1", "3")
    assert row.target == "<think>All about running.</think><Score>3</Score>"


@pytest.mark.parametrize("score", [-1, 4, 10])
def test_a_score_outside_the_scale_is_refused(score: int):
    with pytest.raises(DataError, match=rf"the score is {score}; it must be one of 0, 1, 2, 3"):
        chat_row("r", RUNNER, SHOES, score, "So.")


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("3", ReadFailure.no_score),
        ("<Score>3", ReadFailure.no_score),
        ("<Score>3</Score><Score>3</Score>", ReadFailure.several_scores),
        ("<Score>4</Score>", ReadFailure.score_outside_scale),
        ("<Score>-1</Score>", ReadFailure.score_outside_scale),
        ("<Score>2.5</Score>", ReadFailure.score_outside_scale),
        ("<Score>three</Score>", ReadFailure.score_outside_scale),
        ("<Score></Score>", ReadFailure.score_outside_scale),
        ("So <Score>3</Score>", ReadFailure.text_around_score),
        ("<Score>3</Score><Note>x</Note>", ReadFailure.text_around_score),
    ],
)
def test_each_failure_has_its_name(answer: str, failure: ReadFailure):
    assert parse(f"<think>Why.</think>{answer}") is failure


def test_metrics_by_hand():
    # Truth 0 0 2 3; answers 0, 1, 1, unreadable.
    rows = [chat_row(f"r{number}", RUNNER, SHOES, score, "So.") for number, score in enumerate((0, 0, 2, 3))]
    answers = [
        UserRelevanceJudgement(Score("0"), "x"),
        UserRelevanceJudgement(Score("1"), "x"),
        UserRelevanceJudgement(Score("1"), "x"),
        ReadFailure.no_score,
    ]
    found = metrics(rows, answers)
    assert found["bad/defect_rate"] == 0.5  # RR
    assert found["bad/model_defect_rate"] == 0.25  # Model RR
    assert found["bad/negative_accuracy"] == 0.5  # one of two zeros
    assert found["bad/positive_accuracy"] == 0.5  # the 2 was called a match, the 3 was not readable
    assert found["bad/balanced_accuracy"] == 0.5
    # AUC over (positive, negative): (1, 0) 1, (1, 1) 1/2, the unreadable one loses both -> 1.5 / 4
    assert found["auc"] == 1.5 / 4
    assert found["accuracy"] == 0.25
    assert found["mean_distance"] == (0 + 1 + 1 + 3) / 4
