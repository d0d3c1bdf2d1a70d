"""What an answer comes to, and how probable its label was."""

import math
from collections.abc import Sequence

import pytest

from megatron_ads.config.data import AdsTask, RowVariant, SourceConfig, SourceKind
from megatron_ads.data.sources import read_source
from megatron_ads.inference.engine import Completion, Finish
from megatron_ads.labelling.label_record import label_log_probability, read_label
from megatron_ads.labelling.question_store import Question
from megatron_ads.rows import ChatRow, Message, Role
from megatron_ads.tasks import next_item
from megatron_ads.tasks.answer_format import place_in_element, place_of_answer
from megatron_ads.tasks.registry import TASKS
from megatron_ads.tasks.variants import ask_as
from tests.tasks.examples import row_with_items

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
    found = label_log_probability(_completion(tokens), "Good", "Label", decode=_text)
    assert found == pytest.approx(-(2.0**-5) - 2.0**-6)
    whole = [0, 3, 2]  # one token that is the label, and the whole answer
    assert label_log_probability(_completion(whole), "Good", None, decode=_text) == -(2.0**-2)
    assert label_log_probability(Completion(text="Good"), "Good", None, decode=_text) is None
    assert label_log_probability(_completion(whole), "Bad", None, decode=_text) is None
    assert label_log_probability(_completion(whole), "Good", "Label", decode=_text) is None
    assert label_log_probability(_completion([0, 1, 2]), "Good", None, decode=_text) is None  # never closed


def test_what_the_prompt_has_opened_counts_as_written() -> None:
    behind = [1, 2, 3, 4, 5, 6, 7]
    found = label_log_probability(_completion(behind), "Good", "Label", opened="<think>", decode=_text)
    assert found == pytest.approx(-(2.0**-4) - 2.0**-5)
    alone = label_log_probability(_completion([4, 5, 6, 7]), "Good", "Label", opened="<think></think>", decode=_text)
    assert alone == pytest.approx(-(2.0**-1) - 2.0**-2)


def test_a_label_is_found_in_its_own_element_whatever_else_says_the_same() -> None:
    text = "<think>Good? <Label>Good</Label></think><LocationLabel>Good</LocationLabel><Label>Good</Label>"
    letters = list(range(len(text)))  # a token a letter, each with its place as its log-probability
    said = Completion(text=text, token_ids=tuple(letters), log_probabilities=tuple(map(float, letters)))
    start = text.rindex("Good")
    found = label_log_probability(said, "Good", "Label", decode=lambda some: "".join(text[place] for place in some))
    assert found == sum(range(start, start + 4))


def test_a_label_behind_a_letter_of_several_tokens_has_its_own() -> None:
    text = "\N{SHOPPING BAGS}Shop"
    pieces = [bytes([byte]) for byte in text.encode()]
    values = tuple(float(number) for number in range(len(pieces)))

    def decode(tokens: Sequence[int]) -> str:
        # As tokenizers do: every byte of an incomplete letter becomes a replacement character.
        data = b"".join(pieces[token] for token in tokens)
        return data.decode() if len(data) >= 4 else "\N{REPLACEMENT CHARACTER}" * len(data)

    said = Completion(text=text, token_ids=tuple(range(8)), log_probabilities=values)
    assert label_log_probability(said, text, None, decode=decode) == sum(values[3:])
    assert label_log_probability(said, "Shop", None, decode=decode) == sum(values[4:])


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.label_of])
def test_every_task_says_where_its_label_stands(name: str) -> None:
    row = _row_of(name)
    assert row.task == name and row.label
    place = place_of_answer(row.target)
    if (element := TASKS[name].label_in) is not None:
        found = place_in_element(element, row.target[place:])
        assert found is not None
        place += found
    assert row.target.startswith(row.label, place)


def test_tokens_and_seconds_are_those_of_all_draws() -> None:
    first = _completion([8], prompt_tokens=10, answer_tokens=1, seconds=0.5)
    last = _completion([0, 1, 3, 4, 5, 6, 7], prompt_tokens=10, cached_tokens=8, answer_tokens=7, seconds=1.0)
    label = read_label(_question(), [first, last], reasoning_required=True, decode=_text)
    assert (label.label, label.draws, label.prompt_tokens, label.cached_tokens, label.answer_tokens) == (
        "Good", 2, 20, 8, 8,
    )  # fmt: skip
    assert label.seconds == 1.5 and (label.row, label.source, label.id) == (3, 1, "a")
    assert label.log_probability is not None and math.isclose(label.log_probability, -(2.0**-4) - 2.0**-5)


def test_why_there_is_no_label() -> None:
    refused = Completion(text="too long", finish=Finish.refused)
    assert read_label(_question(), [refused], reasoning_required=True).failure == "refused"
    bare = Completion(text="<Label>Good</Label>")
    assert read_label(_question(), [bare], reasoning_required=True).failure == "no_reasoning"
    assert read_label(_question(), [bare], reasoning_required=False).label == "Good"


def test_an_answer_of_a_task_of_ones_own_is_a_text() -> None:
    said = Completion(text="<think>so</think>whatever it is")
    label = read_label(_question("my_task"), [said], reasoning_required=True)
    assert (label.label, label.answer, label.reasoning, label.failure) == (None, '"whatever it is"', "so", None)
    nothing = Completion(text="<think>so</think>")
    assert read_label(_question("my_task"), [nothing], reasoning_required=True).failure == "empty"


def _row_of(task: str) -> ChatRow:
    """Return a row of a task; of one that is asked of other rows, made from them."""
    if task in {str(one) for one in AdsTask}:
        return read_source(SourceConfig(kind=SourceKind.simulator, task=AdsTask(task), rows=1), seed=0)[0]
    if task == next_item.TASK:  # the simulator's rows have no semantic IDs
        return ask_as([row_with_items("r")], RowVariant.next_item)[0]
    source = SourceConfig(kind=SourceKind.simulator, task=AdsTask.next_advertiser, rows=60, variant=RowVariant(task))
    return read_source(source, seed=0)[0]
