"""Keyword-based query generation: pairs of query and reason, and the rules they follow."""

from dataclasses import replace

import pytest

from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow, Message, Role
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.query_generation import (
    TEMPLATE,
    GeneratedQuery,
    KeywordBrief,
    Queries,
    chat_row,
    metrics,
    parse,
    subject_of,
)
from megatron_ads.tasks.text_rows import facts_of_text_row
from tests.tasks.examples import HOTEL, QUERIES

BRIEF = KeywordBrief("laptop computer")


def test_prompt_shows_keyword_number_and_ad():
    row = chat_row("r", KeywordBrief("paris hotel", HOTEL, queries_wanted=3), QUERIES, "So.")
    assert row.prompt[0].content.splitlines()[1:] == [
        "Keyword: paris hotel",
        "Queries: 3",
        "Ad: Luxury 5-star hotel in central Paris",
        "Seller: www.examplehotel.com",
        "Text: Premium suites.",
    ]


def test_target_has_one_line_per_query_and_is_read_back():
    row = chat_row("r", BRIEF, QUERIES, "Keep the kind.")
    assert row.target.splitlines()[1] == (
        "<Query>refurbished laptops for students</Query><Reason>condition and target group</Reason>"
    )
    assert parse(row.target) == Queries(QUERIES, "Keep the kind.")
    assert row.group == "laptop computer"


def test_empty_keyword_query_and_list_are_refused():
    with pytest.raises(DataError, match="the keyword is ' '"):
        chat_row("r", KeywordBrief(" "), QUERIES, "So.")
    with pytest.raises(DataError, match="Query is ''"):
        chat_row("r", BRIEF, [GeneratedQuery("", "why")], "So.")
    with pytest.raises(DataError, match="there are no queries"):
        chat_row("r", BRIEF, [], "So.")


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("gaming laptop", ReadFailure.no_query),
        ("<Reason>why</Reason>", ReadFailure.no_query),
        ("1. <Query>a b</Query><Reason>why</Reason>", ReadFailure.text_around_queries),
        ("<Query>a b</Query>", ReadFailure.unpaired_reason),
        ("<Query>a</Query><Query>b</Query><Reason>c</Reason><Reason>d</Reason>", ReadFailure.unpaired_reason),
        ("<Reason>why</Reason><Query>a b</Query>", ReadFailure.unpaired_reason),
        ("<Query> </Query><Reason>why</Reason>", ReadFailure.empty_query),
        ("<Query>a b</Query><Reason></Reason>", ReadFailure.empty_query),
    ],
)
def test_each_failure_has_its_name(answer: str, failure: ReadFailure):
    assert parse(f"<think>Why.</think>{answer}") is failure


def test_rules_by_hand():
    row = chat_row("r", BRIEF, QUERIES, "So.")
    answer = Queries(
        tuple(
            GeneratedQuery(text, "why")
            for text in (
                "gaming laptop computer",  # follows all
                "notebook under 500",  # shares "notebook" and "under" with a true query: follows all
                "computer laptop gaming",  # the words of the first
                "laptop",  # broader
                "red running shoes",  # narrower, of another topic
            )
        ),
        "So.",
    )
    found = metrics([row, row], [answer, ReadFailure.no_query])
    assert found["follow_rules"] == pytest.approx((2 / 5 + 0) / 2)
    assert found["narrower_rate"] == 4 / 5
    assert found["repeated_rate"] == 1 / 5
    assert found["queries_per_answer"] == 5.0


def test_a_row_without_keyword_is_compared_with_none():
    row = chat_row("r", BRIEF, QUERIES, "So.")
    row = replace(row, group="", facts={name: value for name, value in row.facts.items() if name != "keyword"})
    found = metrics([row], [Queries((GeneratedQuery("gaming laptop", "why"),), "So.")])
    assert found["follow_rules"] is None and found["narrower_rate"] is None
    assert found["queries_per_answer"] == 1.0


def test_a_text_row_whose_prompt_names_no_keyword_has_its_group():
    own = (
        Message(Role.user, "Which searches?\nA laptop computer, please."),
        chat_row("r", BRIEF, QUERIES, "So.").messages[1],
    )
    row = facts_of_text_row(ChatRow("r", "query_generation", own, group="laptop computer"))
    found = metrics([row], [Queries((GeneratedQuery("gaming laptop computer", "why"),), "So.")])
    assert (found["follow_rules"], found["narrower_rate"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Which searches?\nKeyword: laptop computer\nQueries: 2", "Keyword: laptop computer\nQueries: 2"),
        ("Which searches?\nKeyword: laptop computer\nBe brief.", "Keyword: laptop computer\nBe brief."),
        (f"{TEMPLATE.instruction()}\nFor whom?\nKeyword: tv", "For whom?\nKeyword: tv"),
        ("Searches for a laptop computer?", "Searches for a laptop computer?"),
    ],
)
def test_the_subject_of_a_text_row_is_its_prompt_without_the_first_line(prompt: str, subject: str):
    messages = (Message(Role.user, prompt), chat_row("r", BRIEF, QUERIES, "So.").messages[1])
    assert subject_of(facts_of_text_row(ChatRow("r", "query_generation", messages))) == subject
