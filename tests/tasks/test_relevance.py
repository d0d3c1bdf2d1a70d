"""Prompts, targets and the strict parser of query-ad relevance."""

import pytest

from megatron_ads.errors import DataError
from megatron_ads.rows import Role
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.relevance import (
    BAD_VIEW,
    FAIR_VIEW,
    THREE_LABELS_TEMPLATE,
    Ad,
    Flag,
    Label,
    RelevanceJudgement,
    chat_row,
    metrics,
    parse,
)

AD = Ad(title="Luxury 5-star hotel in central Paris", description="Premium suites.", seller="www.examplehotel.com")


def test_prompt_shows_query_and_ad_line_by_line():
    row = chat_row("r", "cheap hotel in downtown Paris", AD, Label.fair, "Because.")
    assert row.prompt[0].content.splitlines() == [
        "Is the ad relevant to the query?",
        "Query: cheap hotel in downtown Paris",
        "Ad: Luxury 5-star hotel in central Paris",
        "Seller: www.examplehotel.com",
        "Text: Premium suites.",
    ]


def test_prompt_leaves_out_what_is_unknown():
    row = chat_row("r", "hotel", Ad(title="Hotel"), Label.fair, "Because.")
    assert row.prompt[0].content.splitlines()[1:] == ["Query: hotel", "Ad: Hotel"]


def test_target_is_reasoning_then_tagged_label():
    assert chat_row("r", "hotel", AD, Label.fair, "The price does not match.").target == (
        "<think>The price does not match.</think><Label>Fair</Label>"
    )


@pytest.mark.parametrize("label", list(Label))
def test_every_target_is_parsed_to_its_label_and_reasoning(label: Label):
    assert parse(chat_row("r", "hotel", AD, label, "Because.").target) == RelevanceJudgement(
        label=label, reasoning="Because."
    )


def test_white_space_around_the_parts_is_allowed():
    assert parse(" <think>\nBecause.\n</think>\n\n<Label>Bad</Label>\n") == RelevanceJudgement(Label.bad, "Because.")


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("", ReadFailure.empty),
        ("  \n", ReadFailure.empty),
        ("<Label>Good</Label>", ReadFailure.no_reasoning),
        ("<think> </think><Label>Good</Label>", ReadFailure.no_reasoning),
        ("Well. <think>Because.</think><Label>Good</Label>", ReadFailure.no_reasoning),
        ("<think>Because, because, bec", ReadFailure.unclosed_reasoning),
        ("<think>Because.<Label>Good</Label>", ReadFailure.unclosed_reasoning),
        ("<think>Because.</think>", ReadFailure.no_label),
        ("<think>Because.</think>Good", ReadFailure.no_label),
        ("<think>Because.</think><Label>Good", ReadFailure.no_label),
        ("<think><Label>Good</Label></think>", ReadFailure.no_label),
        ("<think>Because.</think><Label>Good</Label><Label>Good</Label>", ReadFailure.several_labels),
        ("<think>Because.</think><Label>good</Label>", ReadFailure.unknown_label),
        ("<think>Because.</think><Label>Excellent</Label>", ReadFailure.unknown_label),
        ("<think>Because.</think><Label>Good</Label> or so", ReadFailure.text_around_label),
        ("<think>Because.</think>So: <Label>Good</Label>", ReadFailure.text_around_label),
    ],
)
def test_each_failure_has_its_name(answer: str, failure: ReadFailure):
    assert parse(answer) is failure


def test_a_row_is_a_conversation_grouped_by_query():
    row = chat_row("r1", "hotel", AD, Label.good, "Because.")
    assert [message.role for message in row.messages] == [Role.user, Role.assistant]
    assert (row.group, row.label, row.weight) == ("hotel", "Good", 1.0)
    assert row.prompt == row.messages[:1]
    assert row.target == "<think>Because.</think><Label>Good</Label>"


def test_views_are_the_papers():
    assert Label.fair not in BAD_VIEW.defects and Label.bad in BAD_VIEW.defects
    assert FAIR_VIEW.defects == {Label.bad, Label.fair}


def three_labels(row_id: str, label: Label, location: Flag, quality: Flag):
    return chat_row(row_id, "hotel", AD, label, "Because.", location=location, quality=quality)


def test_a_row_of_three_labels_asks_for_them_and_gives_them_in_the_papers_order():
    row = three_labels("r1", Label.fair, Flag.good, Flag.bad)
    assert row.prompt[0].content.startswith(THREE_LABELS_TEMPLATE.instruction_of("r1"))
    assert row.target == (
        "<think>Because.</think><LocationLabel>Good</LocationLabel><Label>Fair</Label><AdQuality>Bad</AdQuality>"
    )
    assert row.label == "Fair"
    assert parse(row.target) == RelevanceJudgement(Label.fair, "Because.", location=Flag.good, quality=Flag.bad)


def test_location_and_quality_come_together_or_not_at_all():
    with pytest.raises(DataError, match="location is Good, quality is None; both are needed"):
        chat_row("r1", "hotel", AD, Label.fair, "Because.", location=Flag.good)


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("<LocationLabel>Good</LocationLabel><Label>Fair</Label>", ReadFailure.incomplete_labels),
        (
            "<Label>Fair</Label><LocationLabel>Good</LocationLabel><AdQuality>Bad</AdQuality>",
            ReadFailure.incomplete_labels,
        ),
        ("<LocationLabel>Good</LocationLabel><AdQuality>Bad</AdQuality>", ReadFailure.no_label),
        ("<LocationLabel>Fair</LocationLabel><Label>Fair</Label><AdQuality>Bad</AdQuality>", ReadFailure.unknown_label),
        ("<Label>Fair</Label><Price>Bad</Price>", ReadFailure.text_around_label),
    ],
)
def test_each_failure_of_three_labels(answer: str, failure: ReadFailure):
    assert parse(f"<think>Because.</think>{answer}") is failure


def test_a_label_without_reasoning_can_be_admitted():
    assert parse("<think></think><Label>Good</Label>", reasoning_required=False) == RelevanceJudgement(Label.good, "")


def test_metrics_of_all_four_tables_by_hand():
    rows = [
        three_labels("r1", Label.good, Flag.good, Flag.good),
        three_labels("r2", Label.fair, Flag.bad, Flag.good),
        three_labels("r3", Label.bad, Flag.good, Flag.bad),
        chat_row("r4", "hotel", AD, Label.bad, "Because."),
    ]
    answers = [
        RelevanceJudgement(Label.fair, "x", location=Flag.good, quality=Flag.good),
        RelevanceJudgement(
            Label.fair, "x"
        ),  # one label where three were asked for: unreadable for the other two tables
        RelevanceJudgement(Label.bad, "x", location=Flag.good, quality=Flag.good),
        ReadFailure.no_label,
    ]
    found = metrics(rows, answers)
    assert found["accuracy"] == 0.5
    assert found["bad/balanced_accuracy"] == (1 + 1 / 2) / 2  # both non-defects; one of two defects
    assert found["fair/balanced_accuracy"] == (0 + 2 / 3) / 2
    assert found["location/rows"] == 3
    assert found["location/balanced_accuracy"] == (1 + 0) / 2
    assert found["quality/balanced_accuracy"] == (1 / 2 + 0) / 2


def test_rows_of_one_label_have_no_location_table():
    row = chat_row("r4", "hotel", AD, Label.bad, "Because.")
    assert not any(name.startswith("location") for name in metrics([row], [RelevanceJudgement(Label.bad, "x")]))
