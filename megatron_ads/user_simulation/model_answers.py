"""What a model says is read as one JSON object of a known form, or counted as unreadable; nothing of it is ever run.

An answer is the object behind the reasoning, ``<think>...</think>``, if there is any, and nothing around it. Fields are
exactly those asked for, of their types; numbers, lists and texts are bounded.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from megatron_ads.inference.engine import Completion, Finish
from megatron_ads.tasks.answer_format import CLOSE, OPEN, whole_characters

_LONGEST = 20_000
"""Characters of an answer, which bounds what reading it can cost."""


class UnreadableError(Exception):
    """An answer is not of the form asked for; whoever reads it counts the reason."""


Reader = Callable[[Any], Any]
"""Returns the value of a field, or raises UnreadableError."""


def read_object(said: Completion, forms: Sequence[Mapping[str, Reader]]) -> dict[str, Any]:
    """Return the fields of an answer that is an object of one of some forms, which have different fields.

    Raises:
        UnreadableError: If it is none.
    """
    if said.finish is not Finish.ended:
        raise UnreadableError(str(said.finish))
    text = said.text.rpartition(CLOSE)[2].strip() if CLOSE in said.text else said.text.strip()
    if text.startswith(OPEN):
        raise UnreadableError("unclosed_reasoning")
    if len(text) > _LONGEST:
        raise UnreadableError("too_long")
    try:
        value = json.loads(text, object_pairs_hook=_fields_once, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise UnreadableError("no_json") from None
    if not isinstance(value, dict):
        raise UnreadableError("no_object")
    form = next((form for form in forms if form.keys() == value.keys()), None)
    if form is None:
        raise UnreadableError("other_fields")
    return {name: read(value[name]) for name, read in form.items()}


def _fields_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field is there twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def whole_number(lowest: int, highest: int) -> Reader:
    """Return what reads a whole number within bounds."""

    def read(value: Any) -> int:
        if type(value) is not int or not lowest <= value <= highest:
            raise UnreadableError("no_number_in_range")
        return value

    return read


def flag(value: Any) -> bool:
    """Read true or false."""
    if type(value) is not bool:
        raise UnreadableError("no_flag")
    return value


def text(longest: int) -> Reader:
    """Return what reads a text that is not empty, and puts it on one line of whole characters."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or len(value) > longest:
            raise UnreadableError("no_text")
        return " ".join(whole_characters(value).split())

    return read


def one_of(names: Collection[str]) -> Reader:
    """Return what reads one of some texts, as it is written."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise UnreadableError("unknown_name")
        return value

    return read


def list_of(each: Reader, *, most: int, least: int = 0) -> Reader:
    """Return what reads a list of different values."""

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise UnreadableError("no_list")
        found = tuple(each(one) for one in value)
        if len(set(found)) < len(found):
            raise UnreadableError("repeated_entry")
        return found

    return read
