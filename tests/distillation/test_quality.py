"""Quality control: each rule removes what it is for, in its order, and leaves the rest alone."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_ads.config.data import AdsTask, HistoryConfig
from megatron_ads.config.distillation import DistillConfig, QualityConfig
from megatron_ads.data.questions import without_answer
from megatron_ads.data.simulator.simulated_rows import simulated_examples
from megatron_ads.data.user_features import view_chooser
from megatron_ads.distillation.corpus import one_sided
from megatron_ads.distillation.quality import control, passing
from megatron_ads.distillation.teacher_answers import (
    FurtherDraw,
    TeacherAnswer,
    Unfit,
    answer_from_labels,
    answer_from_row,
    answered_with,
)
from megatron_ads.rows import ChatRow, Fact, Message, Role

OFF = {"min_words": 0, "min_details": 0, "min_probability": 0.0, "min_agreement": 0.0, "min_similarity": 0.0}
GOOD = "<think>sturdy alpine boots are walked in</think><Label>Good</Label>"


def question(number: int, title: str = "sturdy alpine boots") -> ChatRow:
    """Return a pair that is asked about."""
    query = f"hiking shoes {number}"
    facts = {Fact.query: query, Fact.ad: {"title": title, "description": "", "seller": ""}}
    messages = (Message(Role.user, f"{query} / {title}"), Message(Role.assistant, "none"))
    return ChatRow(id=f"r{number}", task="query_ad_relevance", messages=messages, facts=facts)


def answer(number: int, text: str = GOOD, **more: object) -> TeacherAnswer:
    made = TeacherAnswer(answered_with(question(number), text), text)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def controlled(answers: Sequence[TeacherAnswer], **rules: object) -> list[Unfit | None]:
    quality = QualityConfig(**{**OFF, "queries": False, "repeats": False, **rules})  # type: ignore[arg-type]
    control(answers, DistillConfig(out="unused", quality=quality))
    return [one.removed for one in answers]


def test_an_answer_becomes_target_label_and_facts_of_its_row() -> None:
    row = answered_with(question(1), f" {GOOD}\n")
    assert (row.target, row.label) == (GOOD, "Good")
    assert row.facts[Fact.reasoning] == "sturdy alpine boots are walked in"
    assert row.facts[Fact.ground_truth] == {"label": "Good", "location": None, "quality": None}
    assert row.facts[Fact.query] == "hiking shoes 1"
    assert answer_from_row(row).removed is None
    wrong = answer_from_row(replace(row, label="Bad"))
    assert (wrong.removed, wrong.reason) == (Unfit.unreadable, "'Bad', but the target says 'Good'")


def test_labels_become_teacher_answers_and_failures_are_counted_by_their_reason() -> None:
    said = {"text": GOOD, "failure": None, "label": "Good", "reasoning": "r", "log_probability": -0.5}
    failed = {"text": "so", "failure": "no_reasoning", "label": None, "reasoning": None, "log_probability": None}
    good = answer_from_labels(question(1), said, [failed, said])
    assert (good.log_probability, good.removed) == (-0.5, None)
    assert good.further == (FurtherDraw(None, ""), FurtherDraw("Good", "r"))
    bad = answer_from_labels(question(2), failed, [said])
    assert (bad.removed, bad.reason, bad.text) == (Unfit.unreadable, "no_reasoning", "so")


def test_reasoning_must_say_something_about_its_row() -> None:
    vague = "<think>this is what one may want</think><Label>Good</Label>"
    telling = "<think>number 101 is what one may want</think><Label>Good</Label>"  # all else is in most of the inputs
    rows = [answer(101, telling), answer(102, "<think>fine</think><Label>Good</Label>"), answer(103, vague)]
    assert controlled(rows, min_words=3, min_details=1) == [None, Unfit.too_short, Unfit.boilerplate]
    assert rows[1].measured == "1 words"


def test_a_label_that_its_teacher_finds_improbable_is_removed() -> None:
    rows = [answer(1, log_probability=math.log(0.75)), answer(2, log_probability=math.log(0.5)), answer(3)]
    rows[1].log_probability = math.log(0.49)
    assert controlled(rows, min_probability=0.5) == [None, Unfit.improbable, None]
    assert (rows[1].reason, rows[1].measured) == ("label Good", "P 0.49")


@pytest.mark.parametrize(
    ("labels", "removed"),
    [
        (["Good", "Good"], None),
        (["Good", "Bad"], None),  # half agree: not below 0.5
        (["Bad", None], Unfit.disagrees),  # what cannot be read does not agree
        ([], None),
    ],
)
def test_further_draws_must_agree(labels: list[str | None], removed: Unfit | None) -> None:
    further = tuple(FurtherDraw(label, "so") for label in labels)
    assert controlled([answer(1, further=further)], min_agreement=0.5) == [removed]


def test_reasoning_unlike_that_of_further_draws_is_removed() -> None:
    alike = (FurtherDraw("Good", "sturdy alpine boots are what one walks in"),)
    apart = (FurtherDraw("Good", "kettles boil water"),)
    rows = [answer(1, further=alike), answer(2, further=apart), answer(3, further=(FurtherDraw(None, ""),))]
    assert controlled(rows, min_similarity=0.1) == [None, Unfit.unlike_the_others, None]


def test_rows_with_the_words_of_an_earlier_one_are_removed() -> None:
    again = answer(2)
    facts = {**again.row.facts, Fact.query: "1 SHOES, hiking"}
    again.row = replace(again.row, facts=facts)
    rows = [answer(1), again, answer(3)]
    assert controlled(rows, repeats=True) == [None, Unfit.repeats_a_row, None]
    assert again.measured == "as row r1"


def test_queries_against_the_rules_are_removed() -> None:
    view_of = view_chooser(HistoryConfig())
    rows = [each.row for each in simulated_examples(AdsTask.query_generation, 200, seed=0, view_of=view_of)]
    answers = [TeacherAnswer(answered_with(without_answer(row), row.target), row.target) for row in rows]
    keyword = str(rows[0].facts[Fact.keyword])
    broad = f"<think>so</think><Query>{keyword}</Query><Reason>it is the keyword</Reason>"
    answers[0] = TeacherAnswer(answered_with(without_answer(rows[0]), broad), broad)
    assert controlled(answers, queries=True)[0] is Unfit.broader_query
    assert len(passing(answers)) > 0.9 * len(rows)


def test_what_cannot_be_read_is_under_no_further_rule() -> None:
    failed = answer(1)
    failed.remove(Unfit.unreadable, "empty")
    assert controlled([failed, answer(2)], min_words=100) == [Unfit.unreadable, Unfit.too_short]


def test_rules_that_take_one_label_before_others_are_named() -> None:
    good = [answer(number) for number in range(40)]
    bad = [answer(number, "<think>spam</think><Label>Bad</Label>") for number in range(40, 80)]
    control([*good, *bad[:20]], DistillConfig(out="unused", quality=QualityConfig(**{**OFF, "min_words": 3})))  # type: ignore[arg-type]
    assert one_sided([*good, *bad[20:]]) == []  # of these nothing is removed
    assert one_sided([*good, *bad]) == []  # half of Bad is kept, of all labels three in four
    told = "of query_ad_relevance, 0% of label Bad is kept, and 67% of all labels"
    assert one_sided([*good, *bad[:20]]) == [told]
    assert one_sided([*good, *bad[:19]]) == []  # too few to tell
