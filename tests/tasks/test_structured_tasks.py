"""User profile, model comparison and ad rewriting: answers of several parts, and what is measured of them."""

from dataclasses import replace

import pytest

from megatron_ads.errors import DataError
from megatron_ads.tasks import ad_rewriting, model_comparison, user_profile
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.model_comparison import Assessment, Risk, SharedRequest, Verdict
from tests.tasks.examples import ASSESSMENT, BRIEF, PROFILE, REWRITE, RUNNER, SHARED


def test_a_profile_is_written_part_by_part_and_read_back():
    row = user_profile.chat_row("r", RUNNER, PROFILE)
    assert row.target.partition("</think>")[2].splitlines() == [
        "<Summary>Starts to run and buys the first gear.</Summary>",
        "<Interests>running; outdoor</Interests>",
        "<Intents>buy running shoes</Intents>",
        "<Constraints>low price</Constraints>",
        "<Avoid>none</Avoid>",
    ]
    assert user_profile.parse(row.target) == PROFILE


def test_a_profile_needs_a_summary():
    with pytest.raises(DataError, match="Summary is ''"):
        user_profile.chat_row("r", RUNNER, replace(PROFILE, summary=""))


def test_profile_failures_are_named():
    target = user_profile.chat_row("r", RUNNER, PROFILE).target
    assert user_profile.parse(target.replace("<Avoid>none</Avoid>", "")) is ReadFailure.missing_part
    assert user_profile.parse(target.replace("<Avoid>none</Avoid>", "<Avoid> </Avoid>")) is ReadFailure.empty_part
    assert user_profile.parse(target + "<Age>30</Age>") is ReadFailure.unknown_part
    assert user_profile.parse(target + "!") is ReadFailure.text_around_parts


def test_profile_metrics_by_hand():
    row = user_profile.chat_row("r", RUNNER, PROFILE)
    # Interests: 1 of 1 right, 1 of 2 found -> F1 2/3. Summary: 2 of 2 words right, 2 of 8 found -> F1 0.4.
    answer = replace(PROFILE, summary="First gear", interests=("Running",), intents=())
    found = user_profile.metrics([row, row], [answer, ReadFailure.empty])
    assert found["interests/precision"] == 0.5
    assert found["interests/recall"] == 0.25
    assert found["interests/f1"] == pytest.approx((2 / 3) / 2)
    assert found["intents/f1"] == 0.0
    assert found["avoid/f1"] == 0.5  # two empty lists agree; the unreadable answer has nothing
    assert found["summary/word_f1"] == pytest.approx(0.4 / 2)


def test_outputs_are_shown_in_an_order_drawn_by_the_row():
    first = {True: 0, False: 0}
    for number in range(200):
        row = model_comparison.chat_row(f"r{number}", SHARED, ASSESSMENT)
        lines = row.prompt[0].content.splitlines()
        shown_first = lines[2] == "New system: red running shoes"
        assert lines[3 if shown_first else 2] == "Current system: blue hat"
        first[shown_first] += 1
    assert 70 < first[True] < 130  # 100, standard deviation sqrt(200 / 4) = 7


def test_an_assessment_is_read_back_and_its_scales_are_strict():
    target = model_comparison.chat_row("r", SHARED, ASSESSMENT).target
    assert model_comparison.parse(target) == ASSESSMENT
    assert model_comparison.parse(target.replace(">Better<", ">Best<")) is ReadFailure.unknown_verdict
    assert model_comparison.parse(target.replace(">Low<", ">low<")) is ReadFailure.unknown_risk
    assert model_comparison.parse(target.replace("<Risk>Low</Risk>\n", "")) is ReadFailure.missing_part


def test_an_output_without_text_is_refused():
    with pytest.raises(DataError, match="the new output is ''"):
        model_comparison.chat_row("r", SharedRequest("q", "a", ""), ASSESSMENT)


def test_comparison_metrics_by_hand():
    rows = [
        model_comparison.chat_row(f"r{number}", SHARED, Assessment(risk=Risk.none, verdict=verdict, strengths=("s",)))
        for number, verdict in enumerate((Verdict.better, Verdict.better, Verdict.worse, Verdict.same))
    ]
    answers = [
        Assessment(risk=Risk.none, verdict=Verdict.better, strengths=("s",)),
        Assessment(risk=Risk.high, verdict=Verdict.worse, weaknesses=("s", "t")),
        Assessment(risk=Risk.none, verdict=Verdict.worse),
        ReadFailure.empty,
    ]
    found = model_comparison.metrics(rows, answers)
    assert found["verdict/accuracy"] == 0.5
    assert found["verdict/macro_recall"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found["risk/macro_recall"] == 0.5
    assert found["points/f1"] == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)


def test_a_rewrite_is_read_back_with_any_number_of_keywords():
    for rewrite in (REWRITE, replace(REWRITE, keywords=())):
        assert ad_rewriting.parse(ad_rewriting.chat_row("r", BRIEF, rewrite).target) == rewrite


def test_rewriting_failures_are_named():
    target = ad_rewriting.chat_row("r", BRIEF, REWRITE).target
    title = f"<Title>{REWRITE.title}</Title>\n"
    keyword = "<Keyword>cheap running shoes</Keyword>"
    assert ad_rewriting.parse(target.replace(title, "")) is ReadFailure.missing_part
    assert ad_rewriting.parse(target + title) is ReadFailure.parts_out_of_order
    assert ad_rewriting.parse(f"{target}\n{keyword}") is ReadFailure.repeated_keyword
    assert ad_rewriting.parse(f"{target}<Keyword></Keyword>") is ReadFailure.empty_part
    assert ad_rewriting.parse(f"{target} and more") is ReadFailure.text_around_parts


def test_repeated_keywords_and_lists_in_a_keyword_are_refused():
    with pytest.raises(DataError, match="each may be there once"):
        ad_rewriting.chat_row("r", BRIEF, replace(REWRITE, keywords=("a", "a")))
    with pytest.raises(DataError, match="cannot stand in a list"):
        ad_rewriting.chat_row("r", replace(BRIEF, keywords=("a; b",)), REWRITE)


def test_rewriting_metrics_by_hand():
    row = ad_rewriting.chat_row("r", BRIEF, REWRITE)
    same_wording = replace(REWRITE, title=BRIEF.ad.title, text=BRIEF.ad.description)
    invented = replace(REWRITE, text="Light, cushioned and easy on the budget. From 29.99.")
    known_keyword = replace(REWRITE, keywords=("running shoes",))
    for answer in (same_wording, invented, known_keyword):
        assert ad_rewriting.metrics([row], [answer])["usable"] == 0.0
        assert ad_rewriting.metrics([row], [answer])["quality"] == 0.0
    one_keyword = replace(REWRITE, keywords=("cheap running shoes",))
    found = ad_rewriting.metrics([row, row], [one_keyword, ReadFailure.empty])
    assert found["usable"] == 0.5
    assert found["text/word_f1"] == 0.5
    assert found["keywords/f1"] == pytest.approx((2 / 3) / 2)  # 1 of 1 right, 1 of 2 found
    assert found["quality"] == pytest.approx((1 + 2 / 3) / 2 / 2)
