"""What a model says is one object of a known form, or is counted: nothing in between."""

import pytest

from megatron_ads.inference.engine import Completion, Finish
from megatron_ads.user_simulation.language_users import read_page_answer
from megatron_ads.user_simulation.model_answers import (
    UnreadableError,
    flag,
    list_of,
    one_of,
    read_object,
    text,
    whole_number,
)

FORMS = [
    {"a": whole_number(1, 5), "b": list_of(whole_number(1, 3), most=2)},
    {"call": one_of(["search"]), "q": text(9)},
]
GOOD = '{"a": 2, "b": [3, 1]}'


def test_either_form_is_read_with_and_without_reasoning() -> None:
    assert read_object(Completion(text=f" {GOOD}\n"), FORMS) == {"a": 2, "b": (3, 1)}
    assert read_object(Completion(text=f"<think>{{}}</think>{GOOD}"), FORMS)["a"] == 2
    assert read_object(Completion(text='{"q": " x ", "call": "search"}'), FORMS) == {"call": "search", "q": "x"}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("", "no_json"),
        ("I would click on 1.", "no_json"),
        (f"{GOOD} and more", "no_json"),
        (f"```json\n{GOOD}\n```", "no_json"),
        ("__import__('os').system('true')", "no_json"),
        ('{"a": 2, "a": 3, "b": []}', "no_json"),
        ('{"a": NaN, "b": []}', "no_json"),
        ("[" * 15_000, "no_json"),
        ('{"a": 2, "b": [' + "1, " * 9_000 + "1]}", "too_long"),
        ("[1, 2]", "no_object"),
        ('{"a": 2}', "other_fields"),
        ('{"a": 2, "b": [], "c": 0}', "other_fields"),
        ('{"a": true, "b": []}', "no_number_in_range"),
        ('{"a": 2.0, "b": []}', "no_number_in_range"),
        ('{"a": 6, "b": []}', "no_number_in_range"),
        ('{"a": 2, "b": {}}', "no_list"),
        ('{"a": 2, "b": [1, 2, 3]}', "no_list"),
        ('{"a": 2, "b": [1, 1]}', "repeated_entry"),
        ('{"call": "shell", "q": "ls"}', "unknown_name"),
        ('{"call": ["search"], "q": "ls"}', "unknown_name"),
        ('{"call": "search", "q": "   "}', "no_text"),
        ('{"call": "search", "q": "0123456789"}', "no_text"),
        (f"<think>{GOOD}", "unclosed_reasoning"),
    ],
)
def test_anything_else_is_unreadable(said: str, why: str) -> None:
    with pytest.raises(UnreadableError, match=f"^{why}$"):
        read_object(Completion(text=said), FORMS)


def test_what_was_cut_off_or_never_said_is_unreadable() -> None:
    for finish in (Finish.cut_off, Finish.refused, Finish.unanswered, Finish.withheld):
        with pytest.raises(UnreadableError, match=str(finish)):
            read_object(Completion(text=GOOD, finish=finish), FORMS)
    with pytest.raises(UnreadableError, match="no_flag"):
        flag(1)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (r"caf\ud83d", "caf\ufffd"),
        (r"\udca9x", "\ufffdx"),
        (r"\ud83d\ude00", "\U0001f600"),
        ("raw \ud800", "raw \ufffd"),
        (r"a\n\n2. b\u2028c", "a 2. b c"),
    ],
)
def test_a_text_is_one_line_of_whole_characters(said: str, read: str) -> None:
    found = read_object(Completion(text=f'{{"q": "{said}"}}'), [{"q": text(99)}])["q"]
    assert found == read
    found.encode()


def test_a_page_is_read_from_1_and_clicks_need_a_look() -> None:
    page = read_page_answer(Completion(text='{"looks": [3, 1], "clicks": [3], "satisfaction": 4, "leaves": false}'), 3)
    assert (page.looked, page.clicked, page.leaves, page.satisfaction, page.unreadable) == (
        (0, 2),
        (2,),
        False,
        4,
        None,
    )
    blind = read_page_answer(Completion(text='{"looks": [1], "clicks": [2], "satisfaction": 4, "leaves": false}'), 3)
    assert (blind.leaves, blind.unreadable, blind.clicked) == (True, "clicks_without_looking", ())
    beyond = read_page_answer(Completion(text='{"looks": [4], "clicks": [], "satisfaction": 4, "leaves": false}'), 3)
    assert beyond.unreadable == "no_number_in_range"
