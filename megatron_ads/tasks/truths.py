"""The true answer of a row, read from its own target: what metrics compare the model's answers with."""

from enum import StrEnum
from typing import Protocol, TypeVar

from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError

A = TypeVar("A", covariant=True)

Metrics = dict[str, float | None]
"""Named numbers; None is undefined."""


class Parser(Protocol[A]):
    """Reads an answer strictly, or says why it cannot be read."""

    def __call__(self, text: str, *, reasoning_required: bool = True) -> A | StrEnum:
        """Return the answer or a failure."""


def truth_of(row: ChatRow, parse: Parser[A]) -> A:
    """Return the answer that the row's target holds; the target may be without reasoning.

    Raises:
        DataError: If the target cannot be read by the task's own parser.
    """
    truth = parse(row.target, reasoning_required=False)
    if isinstance(truth, StrEnum):
        raise DataError(f"row {row.id!r}: the target cannot be read as an answer of {row.task} ({truth}).")
    return truth


def readable(outcome: A | StrEnum) -> A | None:
    """Return the answer, or None for a failure."""
    return None if isinstance(outcome, StrEnum) else outcome


def share(values: list[bool]) -> float | None:
    """Return the share that is true; None without values."""
    return sum(values) / len(values) if values else None


def mean(values: list[float]) -> float | None:
    """Return the mean; None without values."""
    return sum(values) / len(values) if values else None
