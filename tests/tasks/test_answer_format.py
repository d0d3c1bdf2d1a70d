"""What the answers of all tasks are made of: reasoning, elements, templates."""

import pytest

from megatron_ads.errors import DataError
from megatron_ads.tasks.answer_format import (
    ReadFailure,
    Reasoned,
    Unreadable,
    count_of,
    element,
    listed,
    read_elements,
    read_parts,
    render_reasoned,
    split_reasoning,
    unlisted,
)
from megatron_ads.tasks.prompts import Template

TEMPLATE = Template(task="t", version=1, paraphrases=("One?", "Two?", "Three?"), answer_form="Say so.")


def test_a_row_keeps_its_wording_and_rows_share_them_out():
    drawn = [TEMPLATE.wording_of(f"row-{number}") for number in range(3000)]
    assert drawn == [TEMPLATE.wording_of(f"row-{number}") for number in range(3000)]
    # 1000 each, standard deviation sqrt(3000 * 1/3 * 2/3) = 26
    assert all(abs(drawn.count(wording) - 1000) < 4 * 26 for wording in range(3))


def test_another_version_draws_anew():
    later = Template(task="t", version=2, paraphrases=TEMPLATE.paraphrases)
    ids = [f"row-{number}" for number in range(100)]
    assert [later.wording_of(row) for row in ids] != [TEMPLATE.wording_of(row) for row in ids]
    assert (TEMPLATE.name, later.name) == ("t/1", "t/2")


def test_the_form_of_the_answer_follows_every_wording():
    assert TEMPLATE.instruction(1) == "Two? Say so."
    assert TEMPLATE.instruction_of("row-1") == TEMPLATE.instruction(TEMPLATE.wording_of("row-1"))


def test_reasoning_is_split_from_the_answer():
    assert split_reasoning(" <think> why \n</think>\n Acme ") == Reasoned("why", "Acme")


@pytest.mark.parametrize("text", ["<think></think>Acme", "<think> \n</think>Acme", "Acme"])
def test_missing_reasoning_is_a_failure_only_where_it_is_required(text: str):
    assert split_reasoning(text) is ReadFailure.no_reasoning
    assert split_reasoning(text, required=False) == Reasoned("", "Acme")


def test_reasoning_cannot_hold_the_tag_that_ends_it():
    with pytest.raises(DataError, match="holds </think>"):
        render_reasoned("a </think> b", "Acme")


def test_elements_are_read_in_order_with_white_space_between():
    assert read_elements("<A> one </A>\n <B>two\nlines</B>") == [("A", "one"), ("B", "two\nlines")]
    assert read_elements("") == []
    for text in ("so <A>one</A>", "<A>one</A> so", "<A>one</B>", "<A>one"):
        assert read_elements(text) is None


def test_complete_elements_are_counted_wherever_they_stand():
    assert count_of("A", "so <A>1</A><B><A>2</A></B> <A>3") == 2
    assert count_of("A", "</A><A>") == 0
    assert count_of("A", "<A><A>1</A></A>") == 1


def test_a_long_hostile_text_takes_no_longer_than_its_length():
    # Quadratic time would be minutes: a million opening tags, each looked after to the end.
    hostile = "<A>" * 1_000_000
    assert count_of("A", hostile) == 0
    assert read_elements(hostile) is None
    with pytest.raises(Unreadable, match="missing_part"):
        read_parts(hostile, ("A", "B"))


def test_an_element_needs_text_and_cannot_end_early():
    assert element("A", " one ") == "<A>one</A>"
    with pytest.raises(DataError, match="A is ' '; it must be text that is not empty"):
        element("A", " ")
    with pytest.raises(DataError, match="its own closing tag"):
        element("A", "x</A>y")


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("<A>1</A>", ReadFailure.missing_part),
        ("<A>1</A><B>2", ReadFailure.missing_part),
        ("<A>1</A>and<B>2</B>", ReadFailure.text_around_parts),
        ("<A>1</A><B>2</B><C>3</C>", ReadFailure.unknown_part),
        ("<A>1</A><B>2</B><A>3</A>", ReadFailure.repeated_part),
        ("<B>2</B><A>1</A>", ReadFailure.parts_out_of_order),
        ("<A>1</A><B> </B>", ReadFailure.empty_part),
    ],
)
def test_a_fixed_sequence_says_what_is_wrong_with_it(text: str, failure: ReadFailure):
    with pytest.raises(Unreadable) as caught:
        read_parts(text, ("A", "B"))
    assert caught.value.failure is failure
    assert read_parts("<A>1</A><B>2</B>", ("A", "B")) == {"A": "1", "B": "2"}


def test_lists_of_values():
    assert listed(["a", " b "]) == "a; b"
    assert listed([]) == "none"
    assert unlisted("a; b;; a") == ("a", "b")
    assert unlisted(" None ") == ()
    for bad in ("a;b", " "):
        with pytest.raises(DataError, match="cannot stand in a list"):
            listed([bad])
