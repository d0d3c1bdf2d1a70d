"""Comparisons added up: the numbers, and what they advise."""

import pytest

from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.model_comparison import Advice, Assessment, Risk, Verdict, replacement_report


def judged(verdict: Verdict, risk: Risk = Risk.none, **points: tuple[str, ...]) -> Assessment:
    return Assessment(risk=risk, verdict=verdict, **points)


def test_counts_by_hand():
    answers = [
        judged(Verdict.better, strengths=("price", "place")),
        judged(Verdict.better, strengths=("price",)),
        judged(Verdict.worse, Risk.high, weaknesses=("spam",)),
        judged(Verdict.same, Risk.low),
        ReadFailure.unknown_verdict,
    ]
    report = replacement_report(answers)
    assert report.comparisons == 5
    assert report.verdicts == {"Worse": 1, "Same": 1, "Better": 2}
    assert report.risks == {"None": 2, "Low": 1, "High": 1}
    assert report.failures == {"unknown_verdict": 1}
    assert report.net_share == (2 - 1) / 4
    assert report.high_risk_share == 1 / 4
    assert report.strengths == [("price", 2), ("place", 1)]
    assert report.weaknesses == [("spam", 1)]


@pytest.mark.parametrize(
    ("better", "worse", "high_risk", "unreadable", "advice"),
    [
        (80, 20, 0, 0, Advice.test_online),  # net +0.6, standard error 0.08
        (20, 80, 0, 0, Advice.keep_current),
        (52, 48, 0, 0, Advice.undecided),  # net +0.04, standard error 0.1
        (80, 20, 2, 0, Advice.keep_current),  # 2 of 102 are of high risk, above 1 %
        (80, 20, 0, 30, Advice.undecided),  # 30 of 130 could not be read, above 20 %
        (0, 0, 0, 5, Advice.undecided),
        (0, 0, 0, 0, Advice.undecided),
    ],
)
def test_the_advice_follows_the_rule(better: int, worse: int, high_risk: int, unreadable: int, advice: Advice):
    answers: list[Assessment | ReadFailure] = [judged(Verdict.better)] * better
    answers += [judged(Verdict.worse)] * worse
    answers += [judged(Verdict.better, Risk.high)] * high_risk
    answers += [ReadFailure.empty] * unreadable
    assert replacement_report(answers).advice is advice


def test_requests_that_belong_together_make_the_advice_less_sure():
    answers = [judged(Verdict.better)] * 40 + [judged(Verdict.worse)] * 20
    assert replacement_report(answers).advice is Advice.test_online
    # Three queries of twenty requests each: two better, one worse.
    assert replacement_report(answers, groups=[row // 20 for row in range(60)]).advice is Advice.undecided
