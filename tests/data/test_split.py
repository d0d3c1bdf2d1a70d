"""Held-out rows share no query with the rows trained on."""

from collections import Counter
from dataclasses import replace

import pytest

from megatron_ads.data.ads_pairs import builtin_rows
from megatron_ads.data.split import Repeats, count_repeats, group_of, question_of, split_by_group, split_by_time
from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow, Message, Role
from megatron_ads.tasks.registry import TASKS

MESSAGES = (Message(Role.user, "question"), Message(Role.assistant, "answer"))


def rows_of_groups(sizes: dict[str, int]) -> list[ChatRow]:
    return [ChatRow(f"{group}{n}", "test", MESSAGES, group=group) for group, size in sizes.items() for n in range(size)]


@pytest.mark.parametrize("seed", [0, 1])
def test_no_query_is_on_both_sides(seed: int):
    split = split_by_group(builtin_rows(3000), validation_rows=200, seed=seed)
    assert len(split.validation) == 200
    trained = {row.group for row in split.training}
    held_out = {row.group for row in split.validation}
    assert not trained & held_out
    assert len(held_out) > 20


def test_the_rest_of_a_group_that_is_cut_is_not_trained_on():
    split = split_by_group(rows_of_groups({"a": 10, "b": 10}), validation_rows=3, seed=0)
    assert len(split.validation) == 3
    assert len(split.training) == 10
    assert {row.group for row in split.training}.isdisjoint(row.group for row in split.validation)


def test_which_groups_are_held_out_does_not_depend_on_the_order_of_rows():
    rows = rows_of_groups(dict.fromkeys("abcdefghij", 2))
    forwards = split_by_group(rows, validation_rows=6, seed=0)
    backwards = split_by_group(rows[::-1], validation_rows=6, seed=0)
    assert {row.group for row in forwards.validation} == {row.group for row in backwards.validation}


def test_a_query_is_the_same_whatever_its_capitals_and_spaces():
    rows = rows_of_groups({"running shoes": 2, "Running  Shoes": 2, "RUNNING SHOES ": 2, "tent": 6})
    for seed in range(4):
        split = split_by_group(rows, validation_rows=6, seed=seed)
        assert len(split.training) == len(split.validation) == 6
        assert {row.group == "tent" for row in split.training} ^ {row.group == "tent" for row in split.validation}


def test_rows_without_a_group_are_split_one_by_one():
    rows = [asking(f"question {n}", f"r{n}") for n in range(10)]
    split = split_by_group(rows, validation_rows=4, seed=0)
    assert (len(split.training), len(split.validation)) == (6, 4)


def asking(question: str, row_id: str = "r", answer: str = "yes", **fields: object) -> ChatRow:
    messages = (Message(Role.user, question), Message(Role.assistant, answer))
    return ChatRow(row_id, "test", messages, **fields)  # type: ignore[arg-type]


TWINS = (
    "caf\u00e9 tent?", "cafe\u0301 tent?", "CAF\u00c9 Tent?", " caf\u00e9 \n tent?\t", "caf\u00e9\u00a0tent?",
    "caf\u00e9\u200b tent?", "\ufeffcaf\u00e9 te\u00adnt?", "caf\u00e9\u2060 t\u200dent?\ufe0f",
    "\uff43\uff41\uff46\u00e9 tent\uff1f",
)  # fmt: skip


@pytest.mark.parametrize("twin", TWINS)
def test_what_looks_alike_is_one_group_and_one_question(twin: str):
    assert group_of(asking("x", group=twin)) == group_of(asking("y", group=TWINS[0]))
    assert group_of(asking(twin)) == group_of(asking(TWINS[0]))
    assert group_of(asking("caf\u00e9 tents?")) != group_of(asking(TWINS[0]))


@pytest.mark.parametrize("seed", range(4))
def test_a_question_that_is_asked_again_is_on_one_side(seed: int):
    rows = [asking(f"{twin} {n}", f"{n}-{place}") for n in range(30) for place, twin in enumerate(TWINS)]
    split = split_by_group(rows, validation_rows=50, seed=seed)
    assert len(split.validation) == 50 and len(split.training) == 24 * len(TWINS)
    assert {question_of(row) for row in split.training}.isdisjoint(map(question_of, split.validation))


@pytest.mark.parametrize("seed", range(4))
def test_a_row_without_a_group_stays_with_the_groups_that_ask_the_same(seed: int):
    alone = [asking(f"question {n}", f"alone{n}") for n in range(20)]
    grouped = [asking(f"Question {n}", f"{user}{n}", group=f"{user}{n}") for n in range(20) for user in "uv"]
    split = split_by_group([*alone, *grouped], validation_rows=12, seed=seed)
    questions = {question_of(row) for row in split.validation if not row.group}
    assert questions.isdisjoint(map(question_of, split.training))
    everything = {question_of(row) for row in split.validation}
    assert everything.isdisjoint(question_of(row) for row in split.training if not row.group)


def test_rows_that_declare_groups_are_held_apart_by_these_alone():
    rows = [asking("the same question", f"{group}{n}", group=group) for group in "abcd" for n in range(5)]
    split = split_by_group(rows, validation_rows=5, seed=0)
    assert (len(split.training), len(split.validation)) == (15, 5)


def test_by_time_a_question_without_a_group_is_not_trained_on_either():
    rows = [asking(f"question {n % 5}", f"r{n}", time=float(n)) for n in range(10)]
    split = split_by_time(rows, validation_rows=2, seed=0)
    assert [row.time for row in split.training] == [0, 1, 2, 5, 6, 7]


def test_another_wording_of_an_instruction_asks_the_same():
    task = TASKS["next_advertiser"]
    asked = [f"{task.templates[0].instruction(wording)}\nBought from: Acme" for wording in range(3)]
    assert len({question_of(asking(text)) for text in asked}) == 1
    assert question_of(asking(f"{asked[0]}; Bolt")) != question_of(asking(asked[0]))


def test_a_system_message_is_part_of_the_question():
    row = asking("hello")
    other = replace(row, messages=(Message(Role.system, "Be brief."), *row.messages))
    assert question_of(row) != question_of(other)


def test_repeated_and_contradicting_rows_are_counted():
    rows = [asking("a", "1"), asking(" A ", "2"), asking("a\u200b", "3", "no"), asking("b", "4"), asking("a", "5")]
    assert count_repeats(rows) == Repeats(rows=3, contradicting=1)
    labelled = [replace(row, label=label) for row, label in zip(rows, "GGBGB", strict=True)]
    assert count_repeats(labelled) == Repeats(rows=3, contradicting=2)
    assert str(Repeats(3, 1)) == "3 rows ask what an earlier one asks, 1 of them with another answer"


def test_nothing_is_held_out_unless_asked():
    assert split_by_group(builtin_rows(30), validation_rows=0, seed=0).validation == []


def test_holding_everything_out_is_refused_with_the_numbers():
    with pytest.raises(DataError, match=r"validation_rows = 5 leaves none of the 4 rows \(2 groups"):
        split_by_group(rows_of_groups({"a": 2, "b": 2}), validation_rows=5, seed=0)


def test_a_held_out_group_gives_a_few_of_its_rows_and_trains_on_none():
    rows = rows_of_groups(dict.fromkeys("abcdefghij", 10))
    split = split_by_group(rows, validation_rows=6, seed=0, max_per_group=2)
    held_out = [row.group for row in split.validation]
    assert sorted(Counter(held_out).values()) == [2, 2, 2]
    assert len(split.training) == 70
    assert {row.group for row in split.training}.isdisjoint(held_out)


def test_which_rows_a_group_gives_does_not_depend_on_their_order():
    rows = rows_of_groups(dict.fromkeys("abc", 10))
    forwards = split_by_group(rows, validation_rows=3, seed=0, max_per_group=3)
    backwards = split_by_group(rows[::-1], validation_rows=3, seed=0, max_per_group=3)
    assert forwards.validation == backwards.validation
    assert forwards.validation != rows_of_groups({forwards.validation[0].group: 3})


def test_every_task_gives_rows_in_proportion_and_their_groups_are_held_out_of_all():
    users = [ChatRow(f"{task}{n}", task, MESSAGES, group=f"user{n}") for n in range(200) for task in ("a", "b")]
    queries = [ChatRow(f"q{n}", "c", MESSAGES, group=f"query{n % 4}") for n in range(100)]
    split = split_by_group([*users, *queries], validation_rows=25, seed=0)
    assert Counter(row.task for row in split.validation) == {"a": 10, "b": 10, "c": 5}
    assert {row.group for row in split.training}.isdisjoint(row.group for row in split.validation)
    assert Counter(row.task for row in split.training) == {"a": 190, "b": 190, "c": 75}


def timed(*times: float | None) -> list[ChatRow]:
    return [replace(row, time=time) for row, time in zip(rows_of_groups({"a": len(times)}), times, strict=True)]


def test_by_time_the_latest_rows_are_held_out_and_everything_else_is_earlier():
    split = split_by_time(timed(5, 1, 4, 2, 3), validation_rows=2, seed=0)
    assert sorted(row.time for row in split.validation) == [4, 5]
    assert [row.time for row in split.training] == [1, 2, 3]


def test_by_time_rows_of_one_moment_are_not_divided_between_the_sides():
    split = split_by_time(timed(1, 2, 3, 3, 3), validation_rows=2, seed=0)
    assert [row.time for row in split.validation] == [3, 3]
    assert [row.time for row in split.training] == [1, 2]


def test_by_time_rows_without_a_time_are_trained_on():
    split = split_by_time(timed(1, None, 2), validation_rows=1, seed=0)
    assert [row.time for row in split.training] == [1, None]


def test_by_time_nothing_held_out_keeps_every_row():
    assert len(split_by_time(timed(1, 2), validation_rows=0, seed=0).training) == 2


def test_by_time_what_cannot_be_split_is_refused():
    with pytest.raises(DataError, match=r"data\.split_by is time, but none of the 2 rows has one"):
        split_by_time(timed(None, None), validation_rows=1, seed=0)
    with pytest.raises(DataError, match=r"data\.validation_rows = 5 leaves none of the 2 rows, held out by time"):
        split_by_time(timed(1, 2), validation_rows=5, seed=0)
