"""What an answer comes to, and how probable its label was."""

import math
from collections.abc import Sequence

import pytest

from megatron_ads.inference.engine import Completion, Finish
from megatron_ads.labelling.label_record import label_log_probability, read_label
from megatron_ads.labelling.question_store import Question
from megatron_ads.rows import Message, Role

PIECES = ["<think>", "It is ", "Good", "</think>", "<Label>", "Go", "od", "</Label>", "é"]


def _text(tokens: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in tokens)


def _completion(tokens: Sequence[int], **fields: object) -> Completion:
    values = tuple(-(2.0**-number) for number in range(len(tokens)))
    return Completion(text=_text(tokens), token_ids=tuple(tokens), log_probabilities=values, **fields)  # type: ignore[arg-type]


def _question(task: str = "query_ad_relevance") -> Question:
    return Question(row=3, source=1, id="a", task=task, messages=(Message(Role.user, "?"),), digest=b"0" * 16)


def test_the_labels_log_probability_is_that_of_its_tokens_behind_the_reasoning() -> None:
    tokens = [0, 1, 2, 3, 4, 5, 6, 7]
    found = label_log_probability(_completion(tokens), "Good", _text)
    assert found == pytest.approx(-(2.0**-5) - 2.0**-6)
    whole = [0, 3, 2]  # one token that is the label
    assert label_log_probability(_completion(whole), "Good", _text) == -(2.0**-2)
    assert label_log_probability(Completion(text="Good"), "Good", _text) is None
    assert label_log_probability(_completion(whole), "Bad", _text) is None


def test_tokens_and_seconds_are_those_of_all_draws() -> None:
    first = _completion([8], prompt_tokens=10, answer_tokens=1, seconds=0.5)
    last = _completion([0, 1, 3, 4, 5, 6, 7], prompt_tokens=10, cached_tokens=8, answer_tokens=7, seconds=1.0)
    label = read_label(_question(), last.text, [first, last], reasoning_required=True, decode=_text)
    assert (label.label, label.draws, label.prompt_tokens, label.cached_tokens, label.answer_tokens) == (
        "Good", 2, 20, 8, 8,
    )  # fmt: skip
    assert label.seconds == 1.5 and (label.row, label.source, label.id) == (3, 1, "a")
    assert label.log_probability is not None and math.isclose(label.log_probability, -(2.0**-4) - 2.0**-5)


def test_why_there_is_no_label() -> None:
    refused = Completion(text="too long", finish=Finish.refused)
    assert read_label(_question(), "", [refused], reasoning_required=True).failure == "refused"
    bare = Completion(text="<Label>Good</Label>")
    assert read_label(_question(), bare.text, [bare], reasoning_required=True).failure == "no_reasoning"
    assert read_label(_question(), bare.text, [bare], reasoning_required=False).label == "Good"


def test_an_answer_of_a_task_of_ones_own_is_a_text() -> None:
    said = Completion(text="<think>so</think>whatever it is")
    label = read_label(_question("my_task"), said.text, [said], reasoning_required=True)
    assert (label.label, label.answer, label.reasoning, label.failure) == (None, '"whatever it is"', "so", None)
    nothing = Completion(text="<think>so</think>")
    assert read_label(_question("my_task"), nothing.text, [nothing], reasoning_required=True).failure == "empty"
