"""Next advertiser: one name in free text, twenty in XML."""

import pytest

from megatron_ads.errors import DataError
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.next_advertiser import (
    TEMPLATE,
    Prediction,
    Ranking,
    chat_row,
    metrics,
    parse,
    parse_ranking,
    ranking_metrics,
    ranking_row,
)
from tests.tasks.examples import REQUEST

NAMES = tuple(f"Shop {number}" for number in range(1, 21))


def test_prompt_shows_history_then_pool():
    lines = chat_row("r0", REQUEST, "Shop 7").prompt[0].content.splitlines()
    assert lines[0] == TEMPLATE.instruction_of("r0")
    assert lines[-1].startswith("Advertisers: Shop 1; Shop 2; ")


def test_the_one_name_stands_alone_behind_an_empty_or_full_thought():
    assert chat_row("r", REQUEST, "Shop 7").target == "<think></think>Shop 7"
    assert parse("<think></think>Shop 7") == Prediction("Shop 7", "")
    assert parse("Shop 7") == Prediction("Shop 7", "")
    assert parse("<think>Bought there.</think> Shop 7\n") == Prediction("Shop 7", "Bought there.")


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("", ReadFailure.empty),
        ("<think>a", ReadFailure.unclosed_reasoning),
        ("<think>a</think> ", ReadFailure.no_advertiser),
        ("<think>a</think>Shop 7\nShop 8", ReadFailure.several_lines),
    ],
)
def test_each_failure_of_the_one_name(answer: str, failure: ReadFailure):
    assert parse(answer) is failure


def test_reasoning_can_be_required():
    assert parse("Shop 7", reasoning_required=True) is ReadFailure.no_reasoning


def test_an_empty_name_is_refused():
    with pytest.raises(DataError, match="the advertiser is ' '"):
        chat_row("r", REQUEST, " ")
    with pytest.raises(DataError, match="an interest is ''"):
        ranking_row("r", REQUEST, NAMES, [""], label="Shop 1")


def test_a_ranking_is_read_back_special_characters_included():
    target = ranking_row("r", REQUEST, ["B&B <Home>", "Shop 2"], ["R&B"], "Why.", label="Shop 2").target
    assert "B&amp;B &lt;Home&gt;" in target
    assert parse_ranking(target) == Ranking(("B&B <Home>", "Shop 2"), ("R&B",), "Why.")


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("Shop 1, Shop 2", ReadFailure.not_xml),
        ("<prediction><advertisers>", ReadFailure.not_xml),
        (
            "<prediction><advertisers><advertiser>B&B</advertiser></advertisers><interests/></prediction>",
            ReadFailure.not_xml,
        ),
        ("<ranking/>", ReadFailure.not_xml),
        ("<prediction><interests/></prediction>", ReadFailure.no_advertisers),
        ("<prediction><advertisers/></prediction>", ReadFailure.no_interests),
        ("<prediction><advertisers/><interests/></prediction>", ReadFailure.no_advertiser),
        ("<prediction><advertisers/><interests/><interests/></prediction>", ReadFailure.unknown_part),
        ("<prediction><advertisers><a>x</a></advertisers><interests/></prediction>", ReadFailure.unknown_part),
        (
            "<prediction><advertisers><advertiser> </advertiser></advertisers><interests/></prediction>",
            ReadFailure.empty_entry,
        ),
    ],
)
def test_each_failure_of_the_ranking(answer: str, failure: ReadFailure):
    assert parse_ranking(answer) is failure


def test_entities_of_an_answers_own_are_not_expanded():
    bomb = '<!DOCTYPE p [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    answer = "<prediction><advertisers><advertiser>&b;</advertiser></advertisers><interests/></prediction>"
    assert parse_ranking(bomb + answer) is ReadFailure.not_xml
    assert parse_ranking("<?xml version='1.0'?>" + answer) is ReadFailure.not_xml


def test_names_are_compared_without_case():
    rows = [chat_row(f"r{number}", REQUEST, "Shop 7") for number in range(4)]
    answers = [Prediction("shop 7", ""), Prediction("Shop 8", ""), ReadFailure.empty, Prediction("Shop 7", "")]
    assert metrics(rows, answers) == {"recall@1": 0.5}


def test_ranking_metrics_by_hand():
    rows = [ranking_row(f"r{n}", REQUEST, NAMES, ["a"], label=label) for n, label in enumerate(("Shop 1", "Shop 3"))]
    answers = [Ranking(NAMES, ("a",), ""), Ranking(("Shop 1", "Shop 1", "Shop 3"), (), "")]
    found = ranking_metrics(rows, answers)
    # Positions 1 and 2: the repeated Shop 1 takes no place.
    assert (found["recall@1"], found["recall@5"], found["recall@20"]) == (0.5, 1.0, 1.0)
    assert found["mrr"] == 0.75
    assert found["ndcg@20"] == pytest.approx((1 + 0.6309) / 2, abs=1e-4)  # 1 / log2(3) = 0.6309
    assert found["distinct_rate"] == 22 / 23
    assert found["complete_rate"] == 0.5
    assert ranking_metrics(rows, [ReadFailure.not_xml] * 2)["recall@20"] == 0.0


@pytest.mark.parametrize(
    ("ranking", "complete"),
    [
        (Ranking(NAMES, ("a",) * 5, ""), True),
        (Ranking(NAMES, ("a",) * 6, ""), False),
        (Ranking(NAMES[:19], (), ""), False),
        (Ranking((*NAMES[:19], "Shop 1"), (), ""), False),
        (Ranking((*NAMES[:19], "SHOP 1\u200b"), (), ""), False),
    ],
)
def test_a_complete_ranking_has_twenty_different_names_and_at_most_five_interests(ranking: Ranking, complete: bool):
    assert ranking.is_complete is complete
