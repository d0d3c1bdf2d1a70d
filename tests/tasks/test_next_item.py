"""The next item, asked for and answered by its semantic ID."""

import pytest

from megatron_ads.config.data import RowVariant
from megatron_ads.data.questions import without_answer
from megatron_ads.errors import DataError
from megatron_ads.inference.name_answers import AdvertiserNames, names_trained_on, read_names, valid_names
from megatron_ads.rows import Fact
from megatron_ads.tasks import next_advertiser, next_item
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.next_item import ItemPrediction
from megatron_ads.tasks.user_history import Section, shown_history
from megatron_ads.tasks.variants import ask_as
from tests.tasks.examples import REQUEST, row_with_items

SOCKS, SHOES = "<sid_0_1><sid_1_2>", "<sid_0_1><sid_1_4>"


def test_a_prompt_with_ids_has_one_line_more_and_is_otherwise_the_same():
    row = row_with_items("r")
    with_ids = row.prompt[0].content.splitlines()
    assert with_ids[-1] == f"Recent items: {SOCKS}"
    plain = next_advertiser.chat_row("r", next_advertiser.AdvertiserRequest(REQUEST.user), "Shop 7")
    clicked = "Clicked: how to choose running shoes"
    expected = [line if line != clicked else f"{clicked}; red socks" for line in plain.prompt[0].content.splitlines()]
    assert with_ids[:-1] == expected


def test_the_item_is_asked_for_with_the_same_history():
    (asked,) = ask_as([row_with_items("r")], RowVariant.next_item)
    assert (asked.id, asked.task, asked.label, asked.target) == (
        "r/next_item",
        "next_item",
        SHOES,
        f"<think></think>{SHOES}",
    )
    assert asked.prompt[0].content.splitlines()[1:] == row_with_items("r").prompt[0].content.splitlines()[1:]
    assert shown_history(asked)[Section.semantic_ids] == (SOCKS,)


def test_rows_whose_item_has_no_id_are_left_out_and_none_at_all_is_an_error():
    without = next_advertiser.chat_row("d1", REQUEST, "Shop 7", item="shoes")
    assert Fact.next_semantic_id not in without.facts
    assert [row.id for row in ask_as([without, row_with_items("r")], RowVariant.next_item)] == ["r/next_item"]
    with pytest.raises(DataError, match=r"none of 1 rows says which item .* history\.semantic_ids"):
        ask_as([without], RowVariant.next_item)


def test_an_answer_is_one_semantic_id():
    assert next_item.parse(SHOES) == ItemPrediction(SHOES, "")
    for text in ("", "Shop 7", f"{SHOES} {SOCKS}", f"{SHOES}."):
        assert isinstance(next_item.parse(text), ReadFailure), text
    (row,) = ask_as([row_with_items("r")], RowVariant.next_item)
    answers = [
        ItemPrediction(SHOES, ""),
        ItemPrediction(SOCKS, ""),
        ReadFailure.no_semantic_id,
        ItemPrediction(SHOES, ""),
    ]
    assert next_item.metrics([row] * 4, answers) == {"recall@1": 0.5}


def test_a_row_that_only_asks_does_not_tell_the_item():
    (row,) = ask_as([row_with_items("r")], RowVariant.next_item)
    for told in (row, row_with_items("r")):
        assert SHOES in repr(told)
        assert SHOES not in repr(without_answer(told)) and "'shoes'" not in repr(without_answer(told))
        assert SOCKS in repr(without_answer(told))


def test_items_are_the_valid_answers_and_no_advertisers(tmp_path):
    (row,) = ask_as([row_with_items("r")], RowVariant.next_item)
    trained = names_trained_on([row, row_with_items("r2")])
    assert (valid_names(row, trained), valid_names(row_with_items("r3"), trained)) == (
        (SHOES, SOCKS),
        ("Shop 7", "Shop 2"),
    )
    (tmp_path / "names.txt").write_text(f"{SOCKS}\nShop 1\n{SHOES}\n")
    assert read_names(tmp_path / "names.txt") == AdvertiserNames(
        ("Shop 1",), str(tmp_path / "names.txt"), given=True, items=(SOCKS, SHOES)
    )
