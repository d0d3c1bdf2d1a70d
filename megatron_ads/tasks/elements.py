"""Flat elements, ``<Name>text</Name>`` one after another: the form of every structured answer but the XML ranking."""

import re
from collections.abc import Iterable, Sequence

from megatron_ads.errors import DataError

_ELEMENT = re.compile(r"\s*<([A-Za-z]\w*)>(.*?)</\1>\s*", re.DOTALL)
_LIST_SEPARATOR = ";"
NOTHING = "none"
"""How an empty list is written."""


def element(name: str, text: str) -> str:
    """Return one element.

    Raises:
        DataError: If the text is empty, or would end the element early.
    """
    if not text.strip():
        raise DataError(f"{name} is {text!r}; it must be text that is not empty.")
    if f"</{name}>" in text:
        raise DataError(f"{name} holds its own closing tag: {text!r:.80}. Remove it.")
    return f"<{name}>{text.strip()}</{name}>"


def read_elements(text: str) -> list[tuple[str, str]] | None:
    """Return (name, text) of every element, or None if anything but white space stands between them."""
    found: list[tuple[str, str]] = []
    position = 0
    while position < len(text):
        match = _ELEMENT.match(text, position)
        if match is None:
            return None
        found.append((match[1], match[2].strip()))
        position = match.end()
    return found


def count_of(name: str, text: str) -> int:
    """Return how many complete elements of a name are anywhere in a text, whatever is around them."""
    return len(re.findall(rf"<{name}>.*?</{name}>", text, re.DOTALL))


def listed(values: Iterable[str]) -> str:
    """Return values as the text of one element; ``NOTHING`` without values.

    Raises:
        DataError: If a value holds the separator.
    """
    values = [value.strip() for value in values]
    for value in values:
        if _LIST_SEPARATOR in value or not value:
            raise DataError(f"{value!r} cannot stand in a list separated by {_LIST_SEPARATOR!r}.")
    return f"{_LIST_SEPARATOR} ".join(values) or NOTHING


def unlisted(text: str) -> tuple[str, ...]:
    """Return the values of ``listed``; a value is kept once."""
    if text.strip().lower() == NOTHING:
        return ()
    values: Sequence[str] = [value.strip() for value in text.split(_LIST_SEPARATOR)]
    return tuple(dict.fromkeys(value for value in values if value))
