"""What a teacher is asked and how its answers are read, for every task."""

import pytest

from megatron_ads.config.synthesis import RejectConfig, Style, TemplateConfig
from megatron_ads.inference.engine import Completion
from megatron_ads.rows import ChatRow, Message, Role
from megatron_ads.synthesis.candidates import Removed, details_in, read_candidate
from megatron_ads.synthesis.pipeline import synthesized_row
from megatron_ads.synthesis.prompts import (
    LABEL_GIVEN,
    REVERSE_ENGINEERED,
    FormFailure,
    answer_of,
    question_of,
    read_teacher,
    teacher_messages,
    templates_of,
)
from megatron_ads.tasks.answer_format import Reasoned
from megatron_ads.tasks.registry import TASKS
from megatron_ads.tasks.row_checks import check_rows
from megatron_ads.tasks.text_rows import facts_of_text_row
from tests.tasks.examples import rows_of_all_tasks

ANY = RejectConfig(min_words=1, min_details=0)
ROWS = rows_of_all_tasks()


def test_a_teacher_that_repeats_the_answer_is_understood_for_every_task() -> None:
    assert {row.task for row in ROWS} == set(TASKS)
    for row in ROWS:
        answer = Completion(text=f"<Reasoning>It follows.</Reasoning>\n{answer_of(row)}\n")
        candidate = read_candidate(row, 0, answer, details=frozenset(), config=ANY)
        assert candidate.removed is None, (row.task, candidate.reason)
        result = synthesized_row(candidate)
        assert result.target == f"<think>It follows.</think>{answer_of(row)}"
        assert check_rows([result]).faulty == []


def test_another_answer_of_the_same_task_is_noticed_for_every_task() -> None:
    others = {
        "query_ad_relevance": "<Label>Good</Label>",
        "ad_user_relevance": "<Score>0</Score>",
        "query_generation": "<Query>laptop sleeve</Query><Reason>other</Reason>",
        "next_advertiser": "Shop 8",
        "choose_one": "Shop 8",
    }
    tried = 0
    for row in ROWS:
        if row.task in others:
            text = f"<Reasoning>It follows.</Reasoning>{others[row.task]}"
            candidate = read_candidate(row, 0, Completion(text=text), details=frozenset(), config=ANY)
            assert candidate.removed is Removed.label_differs, row.task
            tried += 1
    assert tried == 6


def test_the_place_of_an_ad_is_part_of_the_label() -> None:
    (row,) = (row for row in ROWS if row.id == "a2")
    other = answer_of(row).replace("<LocationLabel>Good", "<LocationLabel>Bad")
    assert other != answer_of(row)
    for answer in (other, "<Label>Fair</Label>"):
        text = f"<Reasoning>It follows.</Reasoning>{answer}"
        candidate = read_candidate(row, 0, Completion(text=text), details=frozenset(), config=ANY)
        assert candidate.removed is Removed.label_differs


def test_the_prompt_holds_question_and_answer_and_asks_not_to_decide() -> None:
    for row in ROWS:
        (template,) = templates_of(row.task, Style.auto)
        contents = [teacher_messages(row, template, wording)[0]["content"] for wording in range(3)]
        assert len(set(contents)) == 3
        for content in contents:
            assert question_of(row) in content
            assert answer_of(row) in content
            assert "<Reasoning>" in content


def test_what_somebody_does_next_is_asked_for_backwards() -> None:
    backwards = {task for task in TASKS if templates_of(task, Style.auto) == [REVERSE_ENGINEERED]}
    assert backwards == {"next_advertiser", "next_advertiser_ranking", "choose_one", "list_ranking"}
    assert templates_of("next_advertiser", Style.label_given) == [LABEL_GIVEN]


def test_templates_of_ones_own_replace_the_built_in_one_for_their_tasks() -> None:
    own = [TemplateConfig(name="mine/1", wordings=["Explain."], tasks=["yes_no"])]
    assert [template.name for template in templates_of("yes_no", Style.auto, own)] == ["mine/1"]
    assert templates_of("query_ad_relevance", Style.auto, own) == [LABEL_GIVEN]


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("<Reasoning>a</Reasoning>b", Reasoned("a", "b")),
        (" <think>x <Reasoning>no</Reasoning></think> <Reasoning>a</Reasoning> b ", Reasoned("a", "b")),
        ("x</think><Reasoning>a</Reasoning>b", Reasoned("a", "b")),
        ("<Reasoning>a</Reasoning>", Reasoned("a", "")),
        ("  ", FormFailure.empty),
        ("b", FormFailure.no_reasoning),
        ("<Reasoning> </Reasoning>b", FormFailure.no_reasoning),
        ("<Reasoning>a", FormFailure.no_reasoning),
        ("Well: <Reasoning>a</Reasoning>b", FormFailure.text_before_reasoning),
        ("<Reasoning>a</Reasoning><Reasoning>a</Reasoning>b", FormFailure.several_reasonings),
        ("<Reasoning>a <think> c</Reasoning>b", FormFailure.tag_in_reasoning),
        ("<Reasoning>a \ufffd</Reasoning>b", FormFailure.broken_characters),
    ],
)
def test_answers_are_read_strictly(text: str, outcome: Reasoned | FormFailure) -> None:
    assert read_teacher(text) == outcome


@pytest.mark.parametrize(
    ("reasoning", "tells"),
    [
        ("As the given label says, it fits.", True),
        ("The score that was provided is 3.", True),
        ("Since the answer is already known, it fits.", True),
        ("Therefore the relevance label Fair is appropriate.", False),
        ("So the correct label is Bad.", False),
        ("Given the interest in running, the answer is Shop 7.", False),
    ],
)
def test_reasoning_that_knows_the_answer_beforehand_is_noticed(reasoning: str, tells: bool) -> None:
    text = f"<Reasoning>{reasoning}</Reasoning>{answer_of(ROWS[0])}"
    candidate = read_candidate(ROWS[0], 0, Completion(text=text), details=frozenset(), config=ANY)
    assert (candidate.removed is Removed.tells_the_answer_was_given) is tells


def test_details_are_what_is_particular_about_a_row() -> None:
    prompts = [
        f"Is the ad relevant to the query?\nQuery: {a} tent\nAd: {b}" for a, b in [("red", "k2"), ("wide", "x9")]
    ]
    rows = [
        ChatRow(
            str(number), "query_ad_relevance", (Message(Role.user, text), Message(Role.assistant, "<Label>Bad</Label>"))
        )
        for number, text in enumerate([*prompts, prompts[0].replace("red", "old")])
    ]
    rows = list(map(facts_of_text_row, rows))
    details = details_in(rows)
    # "tent" is in all three, "k2" in two of three; "red" is in one.
    assert [details(row) for row in rows] == [{"red"}, {"wide", "x9"}, {"old"}]
