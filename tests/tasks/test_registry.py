"""What holds for every task alike."""

import hashlib
import json
import re
from dataclasses import replace

import pytest

from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow, Fact, Message, Role
from megatron_ads.tasks.ground_truth import ground_truth
from megatron_ads.tasks.registry import TASKS, Task, score_answers, task_named
from tests.tasks.examples import rows_of_all_tasks

ROWS = rows_of_all_tasks()
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.task}-{row.id}")
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)


def test_there_is_an_example_of_every_task():
    assert {row.task for row in ROWS} == set(TASKS)
    assert len(TASKS) == 12


@each_row
def test_every_target_is_read_by_its_own_parser_and_scores_full_marks(row: ChatRow):
    scores = score_answers([row], [row.target])
    assert scores.readable_share == 1.0
    assert scores.failures == {}
    assert scores.headline == pytest.approx(1.0)


@each_row
@pytest.mark.parametrize("reasons", [True, False])
def test_an_answer_must_reason_exactly_where_the_target_of_its_row_does(row: ChatRow, reasons: bool):
    _, _, answer = row.target.partition("</think>")
    row = replace(row, messages=(*row.prompt, Message(Role.assistant, f"<think>{'So.' * reasons}</think>{answer}")))
    required = reasons and TASKS[row.task].reasons
    for bare in (answer, f"<think></think>{answer}", f"<think> </think>{answer}"):
        assert score_answers([row], [bare]).failures == ({"no_reasoning": 1} if required else {})
    assert score_answers([row], [row.target]).failures == {}


@each_row
def test_a_row_is_one_question_and_one_answer(row: ChatRow):
    assert [message.role for message in row.messages] == [Role.user, Role.assistant]
    assert row.group
    assert row.target.startswith("<think>")


@each_task
def test_failures_of_reasoning_have_one_name_in_all_tasks(task: Task):
    assert task.parse("", reasoning_required=True) == "empty"
    assert task.parse("Acme", reasoning_required=True) == "no_reasoning"
    assert task.parse("<think>so", reasoning_required=True) == "unclosed_reasoning"
    assert task.parse("<think> </think>Acme", reasoning_required=True) == "no_reasoning"


@each_task
def test_a_model_that_says_nothing_scores_nothing(task: Task):
    rows = [row for row in ROWS if row.task == task.name]
    scores = score_answers(rows, [""] * len(rows))
    assert scores.failures == {"empty": len(rows)}
    assert scores.readable_share == 0.0
    assert scores.headline == 0.0


@each_task
def test_templates_are_versioned_and_their_wordings_differ(task: Task):
    assert len({template.name for template in task.templates}) == len(task.templates)
    for template in task.templates:
        assert template.version >= 1
        assert len(set(template.paraphrases)) == len(template.paraphrases) >= (1 if template.answer_form == "" else 2)
        assert template.instruction(0).startswith(template.paraphrases[0])


VERSIONS = {
    "query_ad_relevance/1": "11a3977fd5fc",
    "query_ad_relevance/2": "42d56d3d6a56",
    "ad_user_relevance/1": "ecd88a017410",
    "query_generation/1": "2dccaad9608e",
    "next_advertiser/1": "5f6c85fb60f8",
    "next_advertiser_ranking/1": "5e86672e3924",
    "user_profile/1": "1a146a94d384",
    "model_comparison/1": "05544473e37a",
    "ad_rewriting/1": "cc93087c7480",
    "yes_no/query_ad/1": "cfe8ce67a1d8",
    "yes_no/ad_user/1": "61ef3aec4dc8",
    "yes_no/advertiser/1": "df494956fb3f",
    "choose_one/1": "078e16e60ac7",
    "next_item/1": "c499831f3b4d",
    "list_ranking/1": "fad2928e6045",
}
"""What the wordings of each version hash to. Rows were made with them: a change of wording is a new version."""


def test_a_template_keeps_its_words_as_long_as_it_keeps_its_version():
    found = {}
    for template in (template for task in TASKS.values() for template in task.templates):
        words = json.dumps([template.paraphrases, template.answer_form])
        found[template.name] = hashlib.sha256(words.encode()).hexdigest()[:12]
    assert found == VERSIONS


@each_task
def test_the_tags_that_a_form_names_are_those_of_the_target(task: Task):
    targets = " ".join(row.target for row in ROWS if row.task == task.name)
    for template in task.templates:
        for tag in re.findall(r"<(\w+)>", template.answer_form):
            assert f"<{tag}>" in targets, f"{template.name} asks for <{tag}>"


def test_an_unknown_task_is_answered_with_the_nearest():
    with pytest.raises(DataError, match=r"no task 'next_advertizer'. Did you mean next_advertiser"):
        task_named("next_advertizer")
    with pytest.raises(DataError, match="Known: query_ad_relevance, ad_user"):
        task_named("zzz")


def test_rows_of_several_tasks_are_not_scored_together():
    with pytest.raises(DataError, match="rows of one task"):
        score_answers(ROWS[:3], ["", "", ""])
    with pytest.raises(DataError, match="0 rows"):
        score_answers([], [])


def test_a_row_without_its_true_answer_is_named():
    row = replace(ROWS[0], facts={})
    with pytest.raises(DataError, match=r"row 'a1' of task query_ad_relevance has no fact 'ground_truth'"):
        score_answers([row], [""])
    wrong = replace(row, facts={Fact.ground_truth: {"label": "Superb"}})
    with pytest.raises(
        DataError, match=r"row 'a1': the fact ground_truth is .*Superb.*no answer of query_ad_relevance"
    ):
        score_answers([wrong], [""])


@each_row
def test_the_facts_of_a_row_hold_the_answer_of_its_target(row: ChatRow):
    task = TASKS[row.task]
    assert ground_truth(row, task.answer) == task.parse(row.target, reasoning_required=False)


def test_unreadable_answers_are_counted_by_reason():
    row = next(row for row in ROWS if row.task == "ad_user_relevance")
    texts = ["", "<think>a</think><Score>7</Score>", "<think>a</think><Score>3</Score>", ""]
    scores = score_answers([row] * 4, texts)
    assert scores.failures == {"empty": 2, "score_outside_scale": 1}
    assert scores.readable_share == 0.25
    assert scores.formats["think_tag_presence_rate"] == 0.5
    assert scores.headline_name == "accuracy"  # one class only: no balanced accuracy
    assert scores.headline == 0.25
