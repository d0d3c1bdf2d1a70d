"""The true answer of a row, kept among its facts: what metrics and rewards compare the model's answers with."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from enum import StrEnum
from functools import cache
from itertools import zip_longest
from typing import Any, get_args, get_origin, get_type_hints

from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.rows import ChatRow, Fact, Facts
from megatron_ads.tasks.answer_format import A, ReadFailure

Metrics = dict[str, float | None]
"""Named numbers; None is undefined."""
_REASONING = str(Fact.reasoning)


def truth_facts(answer: Any) -> Facts:
    """Return the facts that a true answer makes: its fields as JSON values, and its reasoning by itself.

    Args:
        answer: The record that the task's parser returns.
    """
    values = _as_json(asdict(answer))
    return {Fact.reasoning: values.pop(_REASONING, ""), Fact.ground_truth: values}


def ground_truth(row: ChatRow, kind: type[A]) -> A:
    """Return the true answer of a row as the record that its task's parser returns.

    Raises:
        DataError: If the row's facts have no ground truth, or it is not one of the task.
    """
    values = row.object_fact(Fact.ground_truth)
    try:
        record: A = _record(kind, {_REASONING: row.facts.get(Fact.reasoning, ""), **values})
        return record
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"row {row.id!r}: the fact ground_truth is {values!r:.200}, which is no answer of {row.task} ({error})."
        ) from None


def agrees(answer: Any, row: ChatRow) -> bool:
    """Return whether an answer that was read is a row's true one, whatever its reasoning; repeats count once.

    Names and other free texts are compared folded; labels are not.

    Raises:
        DataError: If the row's facts have no ground truth.
    """
    said = {name: value for name, value in asdict(answer).items() if name != _REASONING}
    return _agree(said, row.object_fact(Fact.ground_truth))


def _agree(said: Any, known: Any) -> bool:
    if isinstance(said, Mapping) and isinstance(known, Mapping):
        return all(_agree(value, known.get(name)) for name, value in said.items())  # a truth may say more
    if isinstance(said, tuple | list) and isinstance(known, tuple | list):
        pairs = zip_longest(_each_once(said), _each_once(known))
        return all(_agree(value, other) for value, other in pairs)
    if isinstance(said, str) and isinstance(known, str) and not isinstance(said, StrEnum):
        return same_name(said) == same_name(known)
    return bool(said == known)


def _each_once(values: Sequence[Any]) -> list[Any]:
    return [value for place, value in enumerate(values) if not any(_agree(value, other) for other in values[:place])]


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _as_json(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_as_json(item) for item in value]
    return str(value).strip() if isinstance(value, str) else value  # white space around a value is not written


def _record(kind: Any, values: Mapping[str, Any]) -> Any:
    hints, required = _fields_of(kind)
    if missing := required - values.keys():
        raise KeyError(f"{', '.join(sorted(missing))} is missing")
    return kind(**{name: _value(hint, values[name]) for name, hint in hints.items() if name in values})


@cache
def _fields_of(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    required = (field.name for field in fields(kind) if field.default is field.default_factory is MISSING)
    return get_type_hints(kind), frozenset(required)


def _value(hint: Any, value: Any) -> Any:
    choices = get_args(hint)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{value!r:.40} is no list")
        return tuple(_value(choices[0], item) for item in value)
    if choices:  # something, or None
        return None if value is None else _value(choices[0], value)
    if is_dataclass(hint):
        return _record(hint, value)
    if not isinstance(value, str if issubclass(hint, str) else hint):
        raise TypeError(f"{value!r:.40} is no {hint.__name__}")
    return hint(value)


def readable(outcome: A | ReadFailure) -> A | None:
    """Return the answer, or None for a failure."""
    return None if isinstance(outcome, ReadFailure) else outcome


def judged(rows: Sequence[ChatRow], answers: Sequence[A | ReadFailure], kind: type[A]) -> list[tuple[A, A | None]]:
    """Return, for each row, the true answer and the one given; None where that cannot be read.

    Raises:
        DataError: If a row's facts have no ground truth, or it is not one of the task.
    """
    return [(ground_truth(row, kind), readable(answer)) for row, answer in zip(rows, answers, strict=True)]
