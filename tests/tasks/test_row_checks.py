"""Bad rows by name and number."""

from dataclasses import replace

import pytest

from megatron_ads.rows import ChatRow, Fact, Message, Role
from megatron_ads.tasks.registry import TASKS
from megatron_ads.tasks.row_checks import RowFault, check_rows, fault_of
from tests.tasks.examples import rows_of_all_tasks

ROWS = {row.id: row for row in rows_of_all_tasks()}


def with_target(row: ChatRow, target: str) -> ChatRow:
    return replace(row, messages=(*row.prompt, Message(Role.assistant, target)))


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: f"{row.task}-{row.id}")
def test_examples_of_all_tasks_have_no_fault(row: ChatRow):
    assert fault_of(row) is None


@pytest.mark.parametrize(
    ("row", "fault", "reason"),
    [
        (with_target(ROWS["a1"], "<think>So.</think><Label>Excellent</Label>"), "unreadable_target", "unknown_label"),
        (with_target(ROWS["b1"], "<think>So.</think><Score>4</Score>"), "unreadable_target", "score_outside_scale"),
        (with_target(ROWS["d2"], "<think></think>Shop 7"), "unreadable_target", "not_xml"),
        (with_target(ROWS["f1"], ""), "empty_text", ""),
        (replace(ROWS["a1"], label="Good"), "label_differs", "'Good', but the target says 'Fair'"),
        (replace(ROWS["d1"], messages=ROWS["d1"].prompt), "no_target", ""),
        (replace(ROWS["d1"], messages=(*ROWS["d1"].messages, ROWS["d1"].messages[0])), "no_target", ""),
        (replace(ROWS["d1"], messages=()), "no_target", ""),
    ],
    ids=lambda value: value if isinstance(value, str) else value.task,
)
def test_each_fault_has_its_name_and_reason(row: ChatRow, fault: str, reason: str):
    found = fault_of(row)
    assert found is not None
    assert (found.row_id, found.task) == (row.id, row.task)
    assert (str(found.fault), found.reason) == (fault, reason)


def test_faulty_rows_are_counted_and_the_others_keep_their_order():
    rows = [replace(ROWS["a1"], label="Good"), ROWS["b1"], replace(ROWS["d1"], messages=()), ROWS["a1"]]
    checked = check_rows([*rows, rows[0]])
    assert checked.rows == [ROWS["b1"], ROWS["a1"]]
    assert checked.counts() == {RowFault.label_differs: 2, RowFault.no_target: 1}


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: f"{row.task}-{row.id}")
def test_a_row_without_a_label_has_that_of_its_target(row: ChatRow):
    (checked,) = check_rows([replace(row, label=None)]).rows
    assert checked == (replace(row, label=None) if TASKS[row.task].label_of is None else row)


@pytest.mark.parametrize("other", ["SHOP 7", " shop\u00a07 ", "Shop 7\u200b"])
def test_a_name_in_other_letters_is_the_same_name(other: str):
    row = replace(ROWS["d1"], label=other, facts={**ROWS["d1"].facts, Fact.ground_truth: {"advertiser": other}})
    assert check_rows([row]).rows == [replace(row, label="Shop 7")]


def test_a_label_of_the_facts_that_is_none_of_the_task_differs():
    row = replace(ROWS["a1"], facts={**ROWS["a1"].facts, Fact.ground_truth: {"label": "fair"}})
    assert fault_of(row).fault is RowFault.ground_truth_differs


def test_label_only_targets_can_be_used():
    assert fault_of(with_target(ROWS["a1"], "<think></think><Label>Fair</Label>")) is None
    assert fault_of(with_target(ROWS["a1"], "<Label>Fair</Label>")) is None


def test_rows_of_other_tasks_are_checked_for_texts_only():
    general = ChatRow("g", "gsm8k", (Message(Role.user, "2 + 2?"), Message(Role.assistant, "4")))
    assert fault_of(general) is None
    empty = fault_of(with_target(general, " "))
    assert empty is not None and empty.fault is RowFault.empty_text


def test_an_answer_among_the_facts_that_is_not_that_of_the_target_is_a_fault():
    row = with_target(ROWS["e1"], ROWS["e1"].target.replace("<Interests>running", "<Interests>rowing"))
    found = fault_of(row)
    assert found is not None and found.fault is RowFault.ground_truth_differs
    assert "but the target says" in found.reason
    assert fault_of(replace(row, facts={})) is None
