"""Other questions over the same records."""

from collections import Counter
from dataclasses import replace

import pytest

from megatron_ads.config.data import RowVariant
from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.rows import ChatRow, Fact, Message, Role
from megatron_ads.tasks import advertiser_question, next_advertiser, variants
from megatron_ads.tasks.advertiser_question import candidates_of
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.next_advertiser import Prediction
from megatron_ads.tasks.relevance import Label
from megatron_ads.tasks.row_checks import fault_of
from megatron_ads.tasks.text_rows import facts_of_text_row
from megatron_ads.tasks.variants import ask_as, several_forms_row
from tests.tasks.examples import POOL, REQUEST, ad_user_row, query_ad_row, question_about

QUESTION = question_about("r", "Shop 7")
OF_NAMES = [variant for variant in RowVariant if variant is not RowVariant.next_item]
"""Those that any row of the next advertiser can be asked as."""


def test_twenty_different_candidates_with_the_true_one_at_any_place():
    places = Counter()
    for number in range(400):
        drawn = candidates_of(f"r{number}", "Shop 7", POOL)
        assert len(drawn) == len(set(drawn)) == 20
        assert drawn == candidates_of(f"r{number}", "Shop 7", POOL)
        places[drawn.index("Shop 7")] += 1
    assert len(places) == 20  # each expected 20 times
    assert max(places.values()) < 45


def test_a_true_one_outside_the_pool_is_a_candidate_too():
    assert "New Shop" in candidates_of("r", "New Shop", POOL)


def test_no_candidate_is_another_in_other_letters():
    pool = [*POOL, *(name.upper() for name in POOL), *(f"{name}\u200b" for name in POOL)]
    for number in range(50):
        drawn = candidates_of(f"r{number}", "shop 7", pool)
        assert len({same_name(name) for name in drawn}) == 20
        assert drawn == tuple(
            "shop 7" if name == "Shop 7" else name for name in candidates_of(f"r{number}", "Shop 7", POOL)
        )


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(DataError, match=r"besides 'a' the pool has 2; 19 are needed"):
        candidates_of("r", "a", ["a", "b", "c", "b"])


@pytest.mark.parametrize(("label", "answer"), [(Label.bad, "No"), (Label.fair, "Yes"), (Label.good, "Yes")])
def test_an_ad_that_is_not_bad_serves_the_query(label: Label, answer: str):
    row = variants.query_ad_row(query_ad_row(label), "r")
    assert (row.id, row.label, row.group) == ("r", answer, "cheap hotel in Paris")
    assert row.target == f"<think>The price differs.</think><Answer>{answer}</Answer>"
    assert row.prompt[0].content.splitlines()[1:] == query_ad_row(label).prompt[0].content.splitlines()[1:]


@pytest.mark.parametrize(("score", "answer"), [(0, "No"), (1, "No"), (2, "Yes"), (3, "Yes")])
def test_two_and_three_are_liked(score: int, answer: str):
    assert variants.ad_user_row(ad_user_row(score), "r").label == answer


def test_half_of_the_advertisers_asked_about_are_the_next_and_only_they_are_argued_for():
    questions = [question_about(f"r{number}", "Shop 7", "It sells gear.") for number in range(200)]
    rows = [variants.advertiser_row(*question) for question in questions]
    yes = [row for row in rows if row.label == "Yes"]
    assert 70 < len(yes) < 130  # 100, standard deviation sqrt(200 / 4) = 7
    for row in rows:
        assert row.prompt[0].content.endswith("\nAdvertiser: Shop 7") is (row.label == "Yes")
        assert ("It sells gear." in row.target) is (row.label == "Yes")


def test_yes_no_failures_and_metrics():
    yes, no = variants.YesNo.yes, variants.YesNo.no
    assert variants.parse_yes_no("Yes") is ReadFailure.no_answer
    assert variants.parse_yes_no("<Answer>Yes</Answer><Answer>No</Answer>") is ReadFailure.several_answers
    assert variants.parse_yes_no("<Answer>yes</Answer>") is ReadFailure.unknown_answer
    assert variants.parse_yes_no("Well: <Answer>Yes</Answer>") is ReadFailure.text_around_answer
    rows = [variants.ad_user_row(ad_user_row(score), f"r{score}") for score in (0, 1, 2, 3)]
    answers = [variants.YesNoAnswer(answer, "") for answer in (no, yes, yes)]
    found = variants.yes_no_metrics(rows, [*answers, ReadFailure.empty])
    assert (found["negative_accuracy"], found["positive_accuracy"]) == (0.5, 0.5)
    assert found["unreadable_rate"] == 0.25


def test_choosing_shows_the_candidates_and_not_the_pool():
    row = advertiser_question.choose_one_row(*QUESTION)
    assert "Advertisers:" not in row.prompt[0].content
    assert row.list_fact(Fact.candidates) == candidates_of("r", "Shop 7", POOL)


def test_a_choice_outside_the_list_is_not_valid():
    row = advertiser_question.choose_one_row(*QUESTION)
    other = next(name for name in row.list_fact(Fact.candidates) if name != "Shop 7")
    answers = [Prediction("shop 7", ""), Prediction(other, ""), Prediction("Nowhere", ""), ReadFailure.empty]
    found = advertiser_question.choose_one_metrics([row] * 4, answers)
    assert found == {"hit_rate@1": 0.25, "valid_rate": 0.5}


def test_a_choice_in_words_of_ones_own_is_scored_without_a_list():
    row = advertiser_question.choose_one_row(*QUESTION)
    own = replace(row, messages=(Message(Role.user, "Shop 7 or Shop 2?"), row.messages[1]), facts={})
    found = advertiser_question.choose_one_metrics([facts_of_text_row(own), row], [Prediction("Shop 7", "")] * 2)
    assert found == {"hit_rate@1": 1.0, "valid_rate": 1.0}


def test_the_list_to_order_is_numbered_and_the_target_has_the_true_one_first():
    row = advertiser_question.list_ranking_row(*QUESTION, count=4)
    listed = row.prompt[0].content.partition("Candidates:\n")[2].splitlines()
    best = next(line for line in listed if line.endswith("Shop 7")).partition(".")[0]
    assert row.label == best
    order = advertiser_question.parse_order(row.target)
    assert isinstance(order, advertiser_question.Order)
    assert order.numbers[0] == int(best)
    assert sorted(order.numbers) == [1, 2, 3, 4]
    assert list(order.numbers[1:]) == sorted(order.numbers[1:])


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("1, 2", ReadFailure.no_ranking),
        ("<Ranking>1</Ranking><Ranking>2</Ranking>", ReadFailure.several_rankings),
        ("Mine: <Ranking>1, 2</Ranking>", ReadFailure.text_around_ranking),
        ("<Ranking>1, B</Ranking>", ReadFailure.not_numbers),
        ("<Ranking>0, 1</Ranking>", ReadFailure.not_numbers),
        ("<Ranking></Ranking>", ReadFailure.not_numbers),
        ("<Ranking>1, 2, 1</Ranking>", ReadFailure.repeated_number),
    ],
)
def test_each_failure_of_an_order(answer: str, failure: ReadFailure):
    assert advertiser_question.parse_order(answer) is failure


def test_order_metrics_by_hand():
    row = advertiser_question.list_ranking_row(*QUESTION, count=4)
    best = int(row.label or 0)
    others = [number for number in range(1, 5) if number != best]
    answers = [
        advertiser_question.Order((others[0], best, *others[1:]), ""),  # second
        advertiser_question.Order(tuple(others), ""),  # the true one is left out
        advertiser_question.Order((best,), ""),  # first, the others are left out
        ReadFailure.empty,
    ]
    found = advertiser_question.list_ranking_metrics([row] * 4, answers)
    assert found["hit_rate@1"] == 0.25
    assert found["hit_rate@5"] == 0.5
    assert found["mrr"] == (0.5 + 1) / 4
    assert found["ndcg@5"] == pytest.approx((0.6309 + 1) / 4, abs=1e-4)
    assert found["complete_rate"] == 0.25


@pytest.mark.parametrize(("place", "found"), [(1, True), (5, True), (6, False)])
def test_hits_count_up_to_the_fifth_place(place: int, found: bool):
    row = advertiser_question.list_ranking_row(*QUESTION)
    numbers = [number for number in range(1, 21) if number != int(row.label or 0)]
    numbers.insert(place - 1, int(row.label or 0))
    measured = advertiser_question.list_ranking_metrics([row], [advertiser_question.Order(tuple(numbers), "")])
    assert measured["hit_rate@5"] == found
    assert measured["complete_rate"] == 1.0


def test_a_corpus_of_many_instructions_holds_all_forms():
    rows = [several_forms_row(*question_about(f"r{number}", "Shop 7")) for number in range(400)]
    tasks = Counter(row.task for row in rows)
    assert set(tasks) == {
        next_advertiser.TASK,
        variants.YES_NO,
        advertiser_question.CHOOSE_ONE,
        advertiser_question.LIST_RANKING,
    }
    assert min(tasks.values()) > 65  # 100 each, standard deviation sqrt(400 * 3/16) = 8.7


def advertiser_rows() -> list[ChatRow]:
    rows = [next_advertiser.chat_row(f"n{number}", REQUEST, f"Shop {number}", "So.") for number in range(1, 25)]
    return [replace(row, weight=0.5) for row in rows]


@pytest.mark.parametrize("variant", OF_NAMES)
def test_rows_asked_again_keep_record_truth_and_weight(variant: RowVariant):
    rows = advertiser_rows()
    asked = ask_as(rows, variant)
    assert asked == ask_as(rows, variant)
    for row, new in zip(rows, asked, strict=True):
        assert (new.id, new.group, new.weight) == (f"{row.id}/{variant}", row.group, 0.5)
        assert "Searched here: beginner 5k training plan" in new.prompt[0].content
        assert "Advertisers:" not in new.prompt[0].content
        assert fault_of(new) is None
    if variant is not RowVariant.several_forms:
        assert {row.task for row in asked} == {variant}


def test_relevance_rows_can_be_asked_as_yes_or_no_and_as_nothing_else():
    rows = [query_ad_row(Label.good), ad_user_row(0)]
    assert [row.label for row in ask_as(rows, RowVariant.yes_no)] == ["Yes", "No"]
    with pytest.raises(DataError, match="'a1' is of task query_ad_relevance, which cannot be asked as choose_one"):
        ask_as(rows, RowVariant.choose_one)


def as_text(row: ChatRow, prompt: str | None = None) -> ChatRow:
    """Return the row as an older file has it, without facts, with a prompt of one's own if given."""
    messages = row.messages if prompt is None else (Message(Role.user, prompt), row.messages[1])
    return facts_of_text_row(replace(row, messages=messages, facts={}))


@pytest.mark.parametrize("prompt", ["Is it good?\nQuery: x", "Is the ad relevant to the query?"])
def test_a_prompt_of_ones_own_cannot_be_asked_again(prompt: str):
    with pytest.raises(DataError, match=r"'a1' begins with 'Is .*, and its facts do not say what it shows"):
        ask_as([as_text(query_ad_row(Label.good), prompt)], RowVariant.yes_no)


@pytest.mark.parametrize("variant", OF_NAMES)
def test_rows_that_came_as_text_are_asked_as_those_with_facts_are(variant: RowVariant):
    rows = [*advertiser_rows()]
    if variant is RowVariant.yes_no:
        rows += [query_ad_row(Label.good), ad_user_row(0)]
    for known, told in zip(ask_as(rows, variant), ask_as(list(map(as_text, rows)), variant), strict=True):
        assert replace(known, facts={}) == replace(told, facts={})


def test_too_few_advertisers_to_choose_from_is_an_error():
    with pytest.raises(DataError, match="the pool has 4; 19"):
        ask_as(advertiser_rows()[:5], RowVariant.choose_one)
