"""Sets of a chosen answer and rejected ones: where they come from, how they are tokenized, and the order of steps."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ads.config.data import AdsTask, DataConfig, RowVariant, SourceConfig, SourceKind
from megatron_ads.config.preference import PreferenceLossConfig
from megatron_ads.data.corpus import answers_alone
from megatron_ads.data.preferences import (
    PreferenceSet,
    PreferenceStream,
    ReferencedSets,
    open_preferences,
    preference_sets,
    rejected_answers,
)
from megatron_ads.data.sources import read_source
from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.rows import ChatRow, Fact, Message, Role
from megatron_ads.tasks.advertiser_question import CANDIDATES
from tests.data.rows import row as tokenized
from tests.data.tokenizers import tokenizer_in

CHOICES = SourceConfig(kind=SourceKind.simulator, task=AdsTask.next_advertiser, variant=RowVariant.choose_one, rows=40)


def _row(name: str = "r", target: str = "best", **changes: Any) -> ChatRow:
    messages = (Message(Role.user, "Which?"), Message(Role.assistant, target))
    facts = {Fact.rejected: ["bad", "worse", "bad", target, " ", "worst"]}
    return ChatRow(**{"id": name, "task": "chat", "messages": messages, "facts": facts} | changes)


def test_rejected_answers_are_drawn_by_id_and_seed_without_repeats_and_without_the_chosen_one() -> None:
    assert rejected_answers(_row(), 9, seed=0) == ["bad", "worse", "worst"]
    drawn = {(name, seed): tuple(rejected_answers(_row(name), 2, seed=seed)) for name in "abcdef" for seed in (0, 1)}
    assert drawn == {(n, s): tuple(rejected_answers(_row(n), 2, seed=s)) for n in "abcdef" for s in (0, 1)}
    assert {len(set(each)) for each in drawn.values()} == {2}
    assert len({drawn[name, 0] for name in "abcdef"}) > 1
    assert [drawn[name, 0] for name in "abcdef"] != [drawn[name, 1] for name in "abcdef"]


def test_other_candidates_of_a_choice_are_rejected_behind_the_same_reasoning() -> None:
    rows = read_source(CHOICES, seed=0)
    for row in rows:
        everyone = rejected_answers(row, 99, seed=0)
        before = row.target.removesuffix(str(row.label))
        assert before != row.target and all(answer.startswith(before) for answer in everyone)
        names = [answer.removeprefix(before) for answer in everyone]
        others = [name for name in row.list_fact(Fact.candidates) if same_name(name) != same_name(str(row.label))]
        assert names == others and len(names) == CANDIDATES - 1
        assert set(rejected_answers(row, 3, seed=0)) < set(everyone)


def test_rows_of_other_questions_tell_no_preference() -> None:
    ranking = replace(CHOICES, variant=RowVariant.list_ranking, rows=25)
    assert not any(rejected_answers(row, 3, seed=0) for row in read_source(ranking, seed=0))


def test_answers_alone_lose_the_reasoning_of_rejected_answers_too() -> None:
    facts = {Fact.rejected: ["<think>no</think>Bolt"]}
    (row,) = answers_alone([_row(task="choose_one", target="<think>why</think>Acme", facts=facts)])
    assert (row.target, row.list_fact(Fact.rejected)) == ("<think></think>Acme", ("<think></think>Bolt",))


def test_sets_begin_with_the_chosen_answer_and_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    rows = [
        _row("a", weight=0.5),
        _row("b", facts={}),
        _row("c", weight=0.0),
        _row("d", facts={Fact.rejected: ["long " * 60]}),
    ]
    (found,), left_out = preference_sets(rows, tokenizer, negatives=2, seq_length=64, seed=0)
    texts = [tokenizer.decode(answer.tokens[answer.loss_weights > 0].tolist()) for answer in found.answers]
    assert texts == ["best", *rejected_answers(rows[0], 2, seed=0)]
    assert found.weight == 0.5 and {float(answer.loss_weights.max()) for answer in found.answers} == {1.0}
    assert left_out == Counter(
        {"without rejected answers": 1, "of weight 0": 1, "with an answer longer than data.seq_length": 1}
    )


def test_a_source_without_any_preference_is_refused(tmp_path: Path) -> None:
    data = DataConfig(sources=[SourceConfig(kind=SourceKind.builtin, rows=20)], seq_length=512)
    message = "None of the 20 training rows of built-in query-ad pairs can be used as a preference: 20 without rejected"
    with pytest.raises(DataError, match=message):
        open_preferences(data, PreferenceLossConfig(), tokenizer_in(tmp_path), per_step=2)


def _sets(first: int = 1000) -> list[PreferenceSet]:
    return [
        PreferenceSet(
            tuple(tokenized(f"{number}/{answer}", 6, first=first + 9 * number + answer) for answer in (0, 1)), 1
        )
        for number in range(5)
    ]


def _stream(sets: list[PreferenceSet], seed: int = 0) -> PreferenceStream:
    return PreferenceStream([(sets, 1.0, "sets")], per_step=2, seed=seed)


def test_looking_ahead_does_not_change_the_order_and_the_state_continues_it_with_what_is_known() -> None:
    stream = _stream(_sets())
    ahead = stream.upcoming(6)
    assert [stream.next_step() for _ in range(2)] == ahead[:2]
    stream.sets.fill(ahead[0], np.arange(4.0))
    state = stream.state_dict()
    again = _stream(_sets())
    again.load_state_dict(state)
    assert again.sets.are_known(ahead[0]) and not again.sets.are_known(range(5))
    assert again.sets.reference_of(ahead[0]).tolist() == [0, 1, 2, 3]
    assert [again.next_step() for _ in range(4)] == ahead[2:]
    assert sorted(number for step in ahead[:5] for number in step) == sorted([*range(5)] * 2)  # two epochs


@pytest.mark.parametrize(
    ("other", "said"),
    [(_stream(_sets(first=2000)), "other content in source 0"), (_stream(_sets(), seed=1), "seed 0, this job has 1")],
    ids=["answers", "seed"],
)
def test_another_sequence_is_refused(other: PreferenceStream, said: str) -> None:
    with pytest.raises(DataError, match=said):
        other.load_state_dict(_stream(_sets()).state_dict())


def test_a_change_of_a_rejected_answer_is_another_content() -> None:
    changed = _sets()
    changed[3] = replace(changed[3], answers=(changed[3].answers[0], tokenized("3/1", 6, first=7)))
    with pytest.raises(DataError, match="other content"):
        _stream(changed).load_state_dict(_stream(_sets()).state_dict())


def test_what_is_known_of_the_reference_stays() -> None:
    sets = ReferencedSets(_sets())
    sets.fill([1], np.array([1.0, 2.0]))
    sets.fill([1, 1, 0], np.arange(6.0))
    assert sets.reference_of([0, 1]).tolist() == [4, 5, 1, 2]
