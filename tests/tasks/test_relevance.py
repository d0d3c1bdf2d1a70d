"""Prompts, targets and the strict parser of query-ad relevance."""

import pytest

from megatron_ads.data.rows import Role
from megatron_ads.tasks.relevance import (
    BAD_VIEW,
    FAIR_VIEW,
    Ad,
    Failure,
    Judgement,
    Label,
    chat_row,
    parse,
    render_prompt,
    render_target,
)

AD = Ad(title="Luxury 5-star hotel in central Paris", description="Premium suites.", seller="www.examplehotel.com")


def test_prompt_shows_query_and_ad_line_by_line():
    assert render_prompt("cheap hotel in downtown Paris", AD).splitlines() == [
        "Is the ad relevant to the query?",
        "Query: cheap hotel in downtown Paris",
        "Ad: Luxury 5-star hotel in central Paris",
        "Seller: www.examplehotel.com",
        "Text: Premium suites.",
    ]


def test_prompt_leaves_out_what_is_unknown():
    assert render_prompt("hotel", Ad(title="Hotel")).splitlines()[1:] == ["Query: hotel", "Ad: Hotel"]


def test_target_is_reasoning_then_tagged_label():
    assert render_target(Label.fair, "The price does not match.") == (
        "<think>The price does not match.</think><Label>Fair</Label>"
    )


@pytest.mark.parametrize("label", list(Label))
def test_every_target_is_parsed_to_its_label_and_reasoning(label: Label):
    assert parse(render_target(label, "Because.")) == Judgement(label=label, reasoning="Because.")


def test_white_space_around_the_parts_is_allowed():
    assert parse(" <think>\nBecause.\n</think>\n\n<Label>Bad</Label>\n") == Judgement(Label.bad, "Because.")


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("", Failure.empty),
        ("  \n", Failure.empty),
        ("<Label>Good</Label>", Failure.no_reasoning),
        ("<think> </think><Label>Good</Label>", Failure.no_reasoning),
        ("Well. <think>Because.</think><Label>Good</Label>", Failure.no_reasoning),
        ("<think>Because, because, bec", Failure.unclosed_reasoning),
        ("<think>Because.<Label>Good</Label>", Failure.unclosed_reasoning),
        ("<think>Because.</think>", Failure.no_label),
        ("<think>Because.</think>Good", Failure.no_label),
        ("<think>Because.</think><Label>Good", Failure.no_label),
        ("<think><Label>Good</Label></think>", Failure.no_label),
        ("<think>Because.</think><Label>Good</Label><Label>Good</Label>", Failure.several_labels),
        ("<think>Because.</think><Label>good</Label>", Failure.unknown_label),
        ("<think>Because.</think><Label>Excellent</Label>", Failure.unknown_label),
        ("<think>Because.</think><Label>Good</Label> or so", Failure.text_around_label),
        ("<think>Because.</think>So: <Label>Good</Label>", Failure.text_around_label),
    ],
)
def test_each_failure_has_its_name(answer: str, failure: Failure):
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
