"""Other questions over the same records."""

from collections import Counter

import pytest

from megatron_ads.errors import DataError
from megatron_ads.tasks import next_advertiser
from megatron_ads.tasks.next_advertiser import Prediction
from megatron_ads.tasks.relevance import Label
from megatron_ads.tasks.variants import choose_one, list_ranking, several_forms, yes_no
from megatron_ads.tasks.variants.candidates import candidates_of
from megatron_ads.tasks.variants.several_forms import Form
from tests.tasks.examples import HOTEL, POOL, REQUEST, RUNNER, SHOES


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


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(DataError, match=r"the pool has 2 others than 'a'; 19 are needed"):
        candidates_of("r", "a", ["a", "b", "c", "b"])


@pytest.mark.parametrize(("label", "answer"), [(Label.bad, "No"), (Label.fair, "Yes"), (Label.good, "Yes")])
def test_an_ad_that_is_not_bad_serves_the_query(label: Label, answer: str):
    row = yes_no.query_ad_row("r", "hotel", HOTEL, label, "So.")
    assert (row.label, row.group) == (answer, "hotel")
    assert row.target == f"<think>So.</think><Answer>{answer}</Answer>"


@pytest.mark.parametrize(("score", "answer"), [(0, "No"), (1, "No"), (2, "Yes"), (3, "Yes")])
def test_two_and_three_are_liked(score: int, answer: str):
    assert yes_no.ad_user_row("r", RUNNER, SHOES, score).label == answer
    with pytest.raises(DataError, match="the score is 5"):
        yes_no.ad_user_row("r", RUNNER, SHOES, 5)


def test_yes_no_failures_and_metrics():
    Failure, yes, no = yes_no.Failure, yes_no.Answer.yes, yes_no.Answer.no
    assert yes_no.parse("Yes") is Failure.no_answer
    assert yes_no.parse("<Answer>Yes</Answer><Answer>No</Answer>") is Failure.several_answers
    assert yes_no.parse("<Answer>yes</Answer>") is Failure.unknown_answer
    assert yes_no.parse("Well: <Answer>Yes</Answer>") is Failure.text_around_answer
    rows = [yes_no.ad_user_row(f"r{score}", RUNNER, SHOES, score) for score in (0, 1, 2, 3)]
    answers = [yes_no.Judgement(answer, "") for answer in (no, yes, yes)]
    found = yes_no.metrics(rows, [*answers, Failure.empty])
    assert (found["negative_accuracy"], found["positive_accuracy"]) == (0.5, 0.5)
    assert found["unreadable_rate"] == 0.25


def test_choosing_shows_the_candidates_and_not_the_pool():
    row = choose_one.chat_row("r", REQUEST, "Shop 7")
    assert "Advertisers:" not in row.prompt[0].content
    assert set(choose_one.listed_in(row)) == set(candidates_of("r", "Shop 7", POOL))


def test_a_choice_outside_the_list_is_not_valid():
    row = choose_one.chat_row("r", REQUEST, "Shop 7")
    other = next(name for name in choose_one.listed_in(row) if name != "Shop 7")
    answers = [Prediction("shop 7", ""), Prediction(other, ""), Prediction("Nowhere", ""), choose_one.Failure.empty]
    found = choose_one.metrics([row] * 4, answers)
    assert found == {"hit_rate@1": 0.25, "valid_rate": 0.5}


def test_the_list_to_order_is_numbered_and_the_target_has_the_true_one_first():
    row = list_ranking.chat_row("r", REQUEST, "Shop 7", count=4)
    listed = row.prompt[0].content.partition("Candidates:\n")[2].splitlines()
    best = next(line for line in listed if line.endswith("Shop 7")).partition(".")[0]
    assert row.label == best
    order = list_ranking.parse(row.target)
    assert isinstance(order, list_ranking.Order)
    assert order.numbers[0] == int(best)
    assert sorted(order.numbers) == [1, 2, 3, 4]
    assert list(order.numbers[1:]) == sorted(order.numbers[1:])


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("1, 2", list_ranking.Failure.no_ranking),
        ("<Ranking>1</Ranking><Ranking>2</Ranking>", list_ranking.Failure.several_rankings),
        ("Mine: <Ranking>1, 2</Ranking>", list_ranking.Failure.text_around_ranking),
        ("<Ranking>1, B</Ranking>", list_ranking.Failure.not_numbers),
        ("<Ranking>0, 1</Ranking>", list_ranking.Failure.not_numbers),
        ("<Ranking></Ranking>", list_ranking.Failure.not_numbers),
        ("<Ranking>1, 2, 1</Ranking>", list_ranking.Failure.repeated_number),
    ],
)
def test_each_failure_of_an_order(answer: str, failure: list_ranking.Failure):
    assert list_ranking.parse(answer) is failure


def test_order_metrics_by_hand():
    row = list_ranking.chat_row("r", REQUEST, "Shop 7", count=4)
    best = int(row.label or 0)
    others = [number for number in range(1, 5) if number != best]
    answers = [
        list_ranking.Order((others[0], best, *others[1:]), ""),  # second
        list_ranking.Order(tuple(others), ""),  # the true one is left out
        list_ranking.Order((best,), ""),  # first, the others are left out
        list_ranking.Failure.empty,
    ]
    found = list_ranking.metrics([row] * 4, answers)
    assert found["hit_rate@1"] == 0.25
    assert found["hit_rate@5"] == 0.5
    assert found["mrr"] == (0.5 + 1) / 4
    assert found["ndcg@5"] == pytest.approx((0.6309 + 1) / 4, abs=1e-4)
    assert found["complete_rate"] == 0.25


def test_a_corpus_of_many_instructions_holds_all_forms():
    rows = [several_forms.chat_row(f"r{number}", REQUEST, "Shop 7") for number in range(400)]
    tasks = Counter(row.task for row in rows)
    assert set(tasks) == {next_advertiser.TASK, yes_no.TASK, choose_one.TASK, list_ranking.TASK}
    assert min(tasks.values()) > 65  # 100 each, standard deviation sqrt(400 * 3/16) = 8.7
    answers = Counter(row.label for row in rows if row.task == yes_no.TASK)
    assert set(answers) == {"Yes", "No"}
    assert min(answers.values()) > 30  # half of about 100 each


def test_forms_can_be_chosen():
    rows = [several_forms.chat_row(f"r{number}", REQUEST, "Shop 7", forms=[Form.name]) for number in range(20)]
    assert {row.task for row in rows} == {next_advertiser.TASK}
    with pytest.raises(DataError, match="no form is given"):
        several_forms.chat_row("r", REQUEST, "Shop 7", forms=[])


def test_a_no_has_no_reasoning_that_argues_for_the_true_one():
    rows = [
        several_forms.chat_row(f"r{n}", REQUEST, "Shop 7", "It sells gear.", forms=[Form.yes_no]) for n in range(40)
    ]
    for row in rows:
        assert ("It sells gear." in row.target) is (row.label == "Yes")
