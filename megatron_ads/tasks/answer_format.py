"""How answers are written and read: reasoning first, then flat elements, ``<Name>text</Name>`` one after another.

A target without reasoning, for tasks or comparisons that leave it out, has an empty block: models that think by
themselves, and chat templates that open the block, then learn to close it at once.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from typing import Any, Protocol, TypeVar

from megatron_ads.errors import DataError

A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)
E = TypeVar("E", bound=StrEnum)

_ELEMENT = re.compile(r"\s*<([A-Za-z]\w*)>(.*?)</\1>\s*", re.DOTALL)
_LIST_SEPARATOR = ";"
NOTHING = "none"
"""How an empty list is written."""


class ReadFailure(StrEnum):
    """Why an answer cannot be read; the first that applies is reported. No task has all of them."""

    empty = "empty"
    no_reasoning = "no_reasoning"
    """No ``<think>`` block, or an empty one."""
    unclosed_reasoning = "unclosed_reasoning"
    """``<think>`` without ``</think>``: usually the answer was cut off."""

    # A fixed sequence of elements
    missing_part = "missing_part"
    repeated_part = "repeated_part"
    empty_part = "empty_part"
    unknown_part = "unknown_part"
    """An element or text that the form does not have; in XML, a list twice as well."""
    parts_out_of_order = "parts_out_of_order"
    text_around_parts = "text_around_parts"

    # Labels, scores, verdicts, yes or no
    no_label = "no_label"
    several_labels = "several_labels"
    unknown_label = "unknown_label"
    text_around_label = "text_around_label"
    incomplete_labels = "incomplete_labels"
    """Neither the label alone nor all three in their order."""
    no_score = "no_score"
    several_scores = "several_scores"
    score_outside_scale = "score_outside_scale"
    """Not one of 0, 1, 2, 3: another number, or no number."""
    text_around_score = "text_around_score"
    unknown_risk = "unknown_risk"
    unknown_verdict = "unknown_verdict"
    no_answer = "no_answer"
    several_answers = "several_answers"
    unknown_answer = "unknown_answer"
    text_around_answer = "text_around_answer"

    # Names and rankings
    no_semantic_id = "no_semantic_id"
    """Something else than one semantic ID."""
    no_advertiser = "no_advertiser"
    """Nothing after the reasoning, or an empty list."""
    several_lines = "several_lines"
    """More than a name, where a name alone was asked for."""
    not_xml = "not_xml"
    """Not one well-formed ``<prediction>``; entities and declarations of its own are not read."""
    no_advertisers = "no_advertisers"
    """No list of advertisers."""
    no_interests = "no_interests"
    """No list of interests; it may be empty."""
    empty_entry = "empty_entry"
    no_ranking = "no_ranking"
    several_rankings = "several_rankings"
    text_around_ranking = "text_around_ranking"
    not_numbers = "not_numbers"
    """Not numbers from 1, separated by commas."""
    repeated_number = "repeated_number"

    # Queries and keywords
    no_query = "no_query"
    text_around_queries = "text_around_queries"
    unpaired_reason = "unpaired_reason"
    """Queries and reasons do not take turns."""
    empty_query = "empty_query"
    """A query or a reason without text."""
    repeated_keyword = "repeated_keyword"


class Unreadable(Exception):
    """An answer cannot be read; the parser returns its ``failure``."""

    def __init__(self, failure: ReadFailure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def whole_characters(text: str) -> str:
    """Return a text in which half a surrogate pair, which JSON can hold and no file can, is U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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


def place_in_element(name: str, text: str) -> int | None:
    """Return where the text of the first element of a name begins, elements in the text of others left out."""
    position = 0
    while match := _ELEMENT.match(text, position):
        if match[1] == name:
            return match.start(2)
        position = match.end()
    return None


def read_only(name: str, text: str) -> str:
    """Return the text of the one element that must be there, with nothing around it.

    Raises:
        Unreadable: ``no_``, ``several_`` or ``text_around_`` with the element's name.
    """
    kind, count = name.lower(), count_of(name, text)
    if count != 1:
        raise Unreadable(ReadFailure(f"several_{kind}s" if count else f"no_{kind}"))
    elements = read_elements(text)
    if elements is None or len(elements) > 1:
        raise Unreadable(ReadFailure(f"text_around_{kind}"))
    return elements[0][1]


def read_choice(text: str, kind: type[E], otherwise: ReadFailure) -> E:
    """Return ``text`` as one of the choices.

    Raises:
        Unreadable: ``otherwise``, if it is none of them.
    """
    if text not in set(kind):
        raise Unreadable(otherwise)
    return kind(text)


def read_parts(text: str, names: Sequence[str]) -> dict[str, str]:
    """Return the texts of elements that must be ``names``, each once, in this order, none empty.

    Raises:
        Unreadable: If they are not.
    """
    if any(count_of(name, text) == 0 for name in names):
        raise Unreadable(ReadFailure.missing_part)
    elements = read_elements(text)
    if elements is None:
        raise Unreadable(ReadFailure.text_around_parts)
    found = [name for name, _ in elements]
    if set(found) - set(names):
        raise Unreadable(ReadFailure.unknown_part)
    if len(found) > len(names):
        raise Unreadable(ReadFailure.repeated_part)
    if found != list(names):
        raise Unreadable(ReadFailure.parts_out_of_order)
    if not all(value for _, value in elements):
        raise Unreadable(ReadFailure.empty_part)
    return dict(elements)


def render_parts(record: Any, names: Sequence[str]) -> str:
    """Return one line per element; its text is the record's field of that name in lower case, a text or a list.

    Raises:
        DataError: If a text is empty, or a value cannot stand in a list.
    """
    values = [getattr(record, name.lower()) for name in names]
    return "\n".join(
        element(name, listed(value) if isinstance(value, tuple) else value)
        for name, value in zip(names, values, strict=True)
    )


def count_of(name: str, text: str) -> int:
    """Return how many complete elements of a name are anywhere in a text, whatever is around them."""
    # Not a regular expression: on a text with many opening tags and no closing one it would take quadratic time.
    opening, closing = f"<{name}>", f"</{name}>"
    count = position = 0
    while True:
        start = text.find(opening, position)
        end = text.find(closing, start) if start >= 0 else -1
        if end < 0:
            return count
        count, position = count + 1, end + len(closing)


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


OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Reasoned:
    """The two parts of an answer, without surrounding white space."""

    reasoning: str
    answer: str


def render_reasoned(reasoning: str, answer: str) -> str:
    """Return the assistant's message.

    Raises:
        DataError: If the reasoning holds a tag that would end it early.
    """
    for tag in (OPEN, CLOSE):
        if tag in reasoning:
            raise DataError(f"the reasoning holds {tag}: {reasoning!r:.80}. Remove the tag; the target adds its own.")
    return f"{OPEN}{reasoning}{CLOSE}{answer}"


def without_reasoning(target: str) -> str:
    """Return a readable target with an empty block of reasoning."""
    parts = split_reasoning(target, required=False)
    return target if isinstance(parts, ReadFailure) else render_reasoned("", parts.answer)


def split_reasoning(text: str, *, required: bool = True) -> Reasoned | ReadFailure:
    """Separate the reasoning from the answer, strictly: nothing may precede ``<think>``.

    Args:
        text: What the model said.
        required: False admits an empty block and none at all, for models that are not asked to reason.
    """
    whole = text.strip()
    if not whole:
        return ReadFailure.empty
    if not whole.startswith(OPEN):
        return ReadFailure.no_reasoning if required else Reasoned("", whole)
    reasoning, closing, answer = whole.removeprefix(OPEN).partition(CLOSE)
    if not closing:
        return ReadFailure.unclosed_reasoning
    if required and not reasoning.strip():
        return ReadFailure.no_reasoning
    return Reasoned(reasoning.strip(), answer.strip())


def place_of_answer(text: str) -> int:
    """Return where the answer begins in a text that ``split_reasoning`` can read: behind the reasoning, if any."""
    start = len(text) - len(text.lstrip())
    return text.index(CLOSE, start) + len(CLOSE) if text.startswith(OPEN, start) else start


class Parser(Protocol[A_co]):
    """Reads an answer strictly, or says why it cannot be read."""

    def __call__(self, text: str, *, reasoning_required: bool = True) -> A_co | ReadFailure:
        """Return the answer or a failure."""


def strict_parser(*, reasons: bool) -> Callable[[Callable[[str, str], A]], Parser[A]]:
    """Make a parser of a function that takes answer and reasoning, and raises :class:`Unreadable`.

    Args:
        reasons: Whether reasoning is required where a call does not say.
    """

    def parser_of(read: Callable[[str, str], A]) -> Parser[A]:
        @wraps(read)
        def parse(text: str, *, reasoning_required: bool = reasons) -> A | ReadFailure:
            parts = split_reasoning(text, required=reasoning_required)
            try:
                return parts if isinstance(parts, ReadFailure) else read(parts.answer, parts.reasoning)
            except Unreadable as error:
                return error.failure

        return parse

    return parser_of
