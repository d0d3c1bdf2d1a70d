"""One table of scores, and how numbers are written in it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_ads.reporting.page import fixed


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """One table; the first column names what a line is of."""

    name: str
    """The same for all datasets."""
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    of: str = ""
    """What is told of the dataset, such as its number of rows."""
    labels: int = 1
    """How many columns, from the first on, hold names and no numbers."""

    @property
    def numbers(self) -> range:
        """The columns of numbers."""
        return range(self.labels, len(self.head))

    @property
    def title(self) -> str:
        """What stands above the table."""
        return f"{self.name} ({self.of})" if self.of else self.name


def counted(counts: Iterable[tuple[str, int]]) -> str:
    """Write how often each name occurs."""
    return ", ".join(f"{name} {count}" for name, count in counts) or "none"


def percent(share: float | None) -> str:
    """Write a share as per cent, as the papers do."""
    return fixed(None if share is None else 100 * share, 2)


def percent_range(interval: Sequence[float] | None) -> str:
    """Write the ends of an interval of shares; nothing without one."""
    return f"{percent(interval[0])} to {percent(interval[1])}" if interval else ""


def signed(value: float | None, digits: int = 3) -> str:
    """Write a difference with its sign."""
    return "–" if value is None else f"{value:+.{digits}f}"


def points(value: float | None, other: float | None) -> str:
    """Write the difference of two shares in percentage points."""
    return "–" if value is None or other is None else signed(100 * (value - other), 2)


def signed_range(interval: Sequence[float] | None, digits: int = 3) -> str:
    """Write the interval of a difference in brackets; nothing without one."""
    return f"({signed(interval[0], digits)} to {signed(interval[1], digits)})" if interval else ""


def signed_points(interval: Sequence[float] | None) -> str:
    """Write the interval of a difference of shares in brackets, in percentage points; nothing without one."""
    return signed_range(interval and [100 * end for end in interval], 2)


def interval_range(interval: Sequence[float] | None, digits: int = 3) -> str:
    """Write an interval in brackets; nothing without one."""
    return f"({fixed(interval[0], digits)} to {fixed(interval[1], digits)})" if interval else ""
