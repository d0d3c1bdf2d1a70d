"""Measure work next to a reference: in turn, so that whatever slows the machine down slows down both."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Timed = Callable[[], float]
"""Does some work once and returns its seconds."""
LEAST_ROUNDS, MOST_ROUNDS = 5, 60


@dataclass(frozen=True, slots=True)
class Effort:
    """How much a case may take upon itself."""

    folder: Path
    """Empty, on the disk that is measured, and removed afterwards."""
    quick: bool = False
    """Small sizes."""

    @property
    def seconds(self) -> float:
        """For how long works are measured in turn, after which no further round begins."""
        return 12.0 if self.quick else 90.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Some work and its reference, round by round.

    ``ratio`` is a speed, in speeds of the reference: 2 is twice as fast, whatever the machine was doing besides.
    """

    name: str
    """``train-step/full``: unique among all cases."""
    work: str
    """In words, as ``reference``."""
    reference: str
    work_seconds: Sequence[float]
    reference_seconds: Sequence[float]
    """Of the same rounds."""
    amount: float = 1.0
    """How many times as much the work does as the reference."""
    tolerance: float = 0.10
    """Slower by this share than the baseline is no finding: what two runs of equal code differ by."""
    growth: tuple[str, float] | None = None
    """What grows, and how much of it there is here: a point of a curve."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What else was found, as JSON values."""

    @property
    def logarithms(self) -> list[float]:
        """Return the logarithm of the ratio of each round."""
        pairs = zip(self.work_seconds, self.reference_seconds, strict=True)
        return [math.log(self.amount * reference / work) for work, reference in pairs]

    @property
    def ratio(self) -> float:
        return math.exp(statistics.median(self.logarithms))

    @property
    def error(self) -> float:
        """Return the standard error of the logarithm of ``ratio``: of a median, from the quartiles of the rounds.

        The quartiles of a normal distribution are 1.349 standard deviations apart, and a median varies by 1.2533 of a
        mean's. Rounds that were disturbed do not move the quartiles, which those of a standard deviation would.
        """
        first, _, third = statistics.quantiles(self.logarithms, n=4)
        return 1.2533 * (third - first) / 1.349 / math.sqrt(len(self.work_seconds))

    def as_json(self) -> dict[str, Any]:
        """Return everything, with medians and quartiles."""
        return {
            "name": self.name,
            "work": self.work,
            "reference": self.reference,
            "ratio": self.ratio,
            "error": self.error,
            "tolerance": self.tolerance,
            "repetitions": len(self.work_seconds),
            "work_seconds": _summary(self.work_seconds),
            "reference_seconds": _summary(self.reference_seconds),
            "amount": self.amount,
            "growth": self.growth,
            "figures": dict(self.figures),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A number that no load of the machine changes, and the least it may be."""

    name: str
    about: str
    value: float
    least: float

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "about": self.about, "value": self.value, "least": self.least}


Finding = Comparison | Share


def _summary(seconds: Sequence[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(seconds, n=4)
    return {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]], "rounds": list(seconds)}


def clocked(work: Callable[[], object]) -> Timed:
    """Return ``work`` with the seconds that it takes as its value, less those that this thread waits for a core.

    What a sleep, a disk or another process takes counts; that a busy machine lets others run first does not. Where the
    kernel does not tell how long that was (Linux does), the ratio has to bear it.
    """

    def timed() -> float:
        began, waited = time.perf_counter(), seconds_in_queue()
        work()
        waited = seconds_in_queue() - waited  # within the other two readings: no time is negative
        return time.perf_counter() - began - waited

    return timed


def seconds_in_queue() -> float:
    """Return for how long this thread could have run but had no core, since it began."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def in_turn(
    works: Mapping[str, Timed],
    *,
    seconds: float,
    least: int = LEAST_ROUNDS,
    most: int = MOST_ROUNDS,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Do each work once a round, every other round in reverse; return the seconds of each, by round.

    Rounds end after ``seconds``, but not before there are ``least``. Those of the warm-up are not among them.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    names, began, number = list(works), time.monotonic(), 0
    while number < warm_up + least or (number < warm_up + most and time.monotonic() - began < seconds):
        if number == warm_up:
            began = time.monotonic()
        for name in names if number % 2 else reversed(names):
            spent = works[name]()
            if number >= warm_up:
                taken[name].append(spent)
        number += 1
    return taken
