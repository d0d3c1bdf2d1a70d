"""Agreement with the true label: exact, by distance on a scale, and the form."""

import math

import pytest

from megatron_ads.errors import ConfigError
from megatron_ads.tasks import ad_user_relevance, relevance, variants
from megatron_ads.tasks.ad_user_relevance import Score
from megatron_ads.tasks.relevance import Flag, Label
from tests.rewards.rollouts import answers, chat_row, failures, rewards, values
from tests.tasks.examples import HOTEL, RUNNER, SHOES

PAIR = relevance.chat_row("r", "hotel", HOTEL, Label.good, "Fits.")
SCORED = ad_user_relevance.chat_row("r", RUNNER, SHOES, Score.weak, "Runs.")


def judged(label: str) -> str:
    return f"<think>So.</think><Label>{label}</Label>"


def scored(score: str) -> str:
    return f"<think>So.</think><Score>{score}</Score>"


def test_the_distance_on_the_scale_counts() -> None:
    # Three labels: each step costs 1/2. Unreadable: no format term either.
    texts = [judged("Good"), judged("Fair"), judged("Bad"), judged("Great"), "<Label>Good</Label>"]
    assert values("label_agreement", answers(PAIR, texts)) == pytest.approx([1.2, 0.7, 0.2, 0.0, 0.0])
    # Four scores, the truth is 1: |i - 1| / 3.
    found = values("label_agreement", answers(SCORED, list(map(scored, "0123"))))
    assert found == pytest.approx([2 / 3 + 0.2, 1.2, 2 / 3 + 0.2, 1 / 3 + 0.2])


def test_exact_agreement_knows_no_distance() -> None:
    settings = {"ordinal": False, "format_weight": 0.5}
    texts = [judged("Good"), judged("Fair"), "none"]
    assert values("label_agreement", answers(PAIR, texts), settings) == [1.5, 0.5, 0.0]


def test_three_labels_count_alike() -> None:
    row = relevance.chat_row("r", "hotel", HOTEL, Label.good, "Fits.", location=Flag.good, quality=Flag.bad)

    def said(location: str, label: str, quality: str) -> str:
        tags = f"<LocationLabel>{location}</LocationLabel><Label>{label}</Label><AdQuality>{quality}</AdQuality>"
        return f"<think>So.</think>{tags}"

    # (label, location, quality): (1, 1, 1), (1/2, 0, 1); the label alone leaves the others wrong: (1, 0, 0).
    texts = [said("Good", "Good", "Bad"), said("Bad", "Fair", "Bad"), judged("Good")]
    assert values("label_agreement", answers(row, texts)) == pytest.approx([1.2, 0.5 + 0.2, 1 / 3 + 0.2])


def test_labels_without_a_scale_agree_or_do_not() -> None:
    row = chat_row(task=variants.YES_NO, target="<Answer>Yes</Answer>", label="Yes")
    assert values("label_agreement", answers(row, ["<Answer>Yes</Answer>", "<Answer>No</Answer>"])) == [1.2, 0.2]


def test_rows_of_other_tasks_have_no_value() -> None:
    found = values("label_agreement", answers(chat_row(), ["yes"]) + answers(PAIR, [judged("Good")], group=1))
    assert math.isnan(found[0]) and found[1] == 1.2


def test_a_row_without_its_label_loses_its_answers_alone() -> None:
    unlabelled = chat_row("x", relevance.TASK, judged("Good"))
    scores = rewards("label_agreement").score(answers(unlabelled, ["a", "b"]) + answers(PAIR, ["c"], group=1))
    assert scores.faults == {"label_agreement/raised": 2}
    assert failures(scores)[0].startswith("raised: row 'x' of task query_ad")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("label_agrement", {}, r"rewards.use\[0\].name is 'label_agrement'. Did you mean label_agreement\?"),
        ("label_agreement", {"ordnal": True}, r"use\[0\].settings has no 'ordnal'. Did you mean ordinal\?"),
        ("label_agreement", {"ordinal": 1}, r"settings.ordinal is 1; it must be of type bool"),
        ("label_agreement", {"format_weight": True}, r"format_weight is True; it must be of type float"),
    ],
)
def test_unknown_rewards_and_settings_are_named(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rewards(name, settings)
