"""Rows that came as text have the facts that their texts tell."""

from dataclasses import replace

import pytest

from megatron_ads.config.data import RowVariant
from megatron_ads.errors import DataError
from megatron_ads.inference.name_answers import bought_from, names_trained_on
from megatron_ads.rows import ChatRow, Fact, Message, Role
from megatron_ads.tasks import next_advertiser
from megatron_ads.tasks.text_rows import facts_of_text_row
from megatron_ads.tasks.user_history import Event, EventKind, UserHistory
from megatron_ads.tasks.variants import ask_as
from tests.tasks.examples import rows_of_all_tasks

ROWS = {row.id: row for row in rows_of_all_tasks()}
NOT_SHOWN = {
    Fact.user, Fact.events, Fact.demographics, Fact.best_answers, Fact.next_item, Fact.next_semantic_id
}  # fmt: skip


def told(row: ChatRow, prompt: str | None = None) -> ChatRow:
    messages = row.messages if prompt is None else (Message(Role.user, prompt), row.messages[1])
    return facts_of_text_row(replace(row, messages=messages, facts={}))


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: f"{row.task}-{row.id}")
def test_texts_tell_all_that_a_prompt_shows(row: ChatRow) -> None:
    found = told(row).facts
    assert found == {name: row.facts[name] for name in found if name in row.facts} | {Fact.read_from_prompt: True}
    missing = {name for name in row.facts.keys() - found.keys() if row.facts[name]}
    assert missing <= NOT_SHOWN


def test_facts_that_a_row_has_are_not_read_again() -> None:
    row = replace(ROWS["a1"], facts={Fact.query: "another", "mine": 1})
    facts = facts_of_text_row(row).facts
    assert (facts[Fact.query], facts["mine"], Fact.ad in facts) == ("another", 1, False)
    assert facts[Fact.ground_truth] == {"label": "Fair", "location": None, "quality": None}


def test_a_prompt_of_ones_own_is_a_text_with_the_lines_that_look_like_those_of_a_template() -> None:
    own = "Whom next?\nNote this.\nBought from: Acme; Bolt\nSearched here: shoes\nBe brief."
    facts = told(ROWS["d1"], own).facts
    assert facts[Fact.text] == own
    assert facts[Fact.history] == {"past_advertisers": ["Acme", "Bolt"], "onsite_searches": ["shoes"]}


def test_a_target_that_cannot_be_read_tells_no_answer() -> None:
    row = replace(ROWS["a1"], messages=(ROWS["a1"].messages[0], Message(Role.assistant, "Fair")))
    row = told(row)
    assert row.facts[Fact.query] == "cheap hotel in Paris"
    with pytest.raises(DataError, match="'a1' of task query_ad_relevance has no fact 'ground_truth'; it must be an ob"):
        row.object_fact(Fact.ground_truth)


def test_a_name_with_the_separator_in_it_stays_one_name() -> None:
    event = Event(kind=EventKind.matched_conversion, days_ago=1, text="boots", advertiser="Boots; Shoes & Co")
    request = next_advertiser.AdvertiserRequest(UserHistory(user_id="u", events=(event,)))
    row = next_advertiser.chat_row("r", request, "Acme")
    assert bought_from(row) == ("Boots; Shoes & Co",)
    assert names_trained_on([row]).names == ("Acme", "Boots; Shoes & Co")
    assert names_trained_on([told(row)]).names == ("Acme",)  # from text: "Boots" is no shop
    asked = ask_as([told(row), told(ROWS["d1"])], RowVariant.yes_no)
    assert all(row.facts[Fact.read_from_prompt] is True for row in asked)


def test_other_tasks_are_left_as_they_are() -> None:
    row = ChatRow("g", "gsm8k", (Message(Role.user, "2 + 2?"), Message(Role.assistant, "4")))
    assert facts_of_text_row(row) is row


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [(Fact.query, 3, "a text"), (Fact.candidates, ["a", 1], "a list of texts"), (Fact.ad, "shoes", "an object")],
)
def test_a_fact_of_another_type_is_named(name: Fact, value: object, wanted: str) -> None:
    row = replace(ROWS["a1"], facts={name: value})  # type: ignore[dict-item]
    read = {"a text": row.text_fact, "a list of texts": row.list_fact, "an object": row.object_fact}[wanted]
    with pytest.raises(DataError, match=rf"row 'a1' .* has .* as fact '{name}'; it must be {wanted}"):
        read(name)
