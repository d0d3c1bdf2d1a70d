"""How a job is asked to stop, and the file that says how it ended. No torch, for launchers."""

import json
import signal
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Self

from conversion.atomic_file import write_small

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers that a stop signal came. Each step tells the other ranks, so that all stop after the same step."""

    def __init__(self, *signals: signal.Signals) -> None:
        self._signals = signals or STOP_SIGNALS
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._remember) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)


OUTCOME_FILE = "outcome.json"


class Outcome(StrEnum):
    """The ways a job ends without an error."""

    FINISHED = "finished"
    """Every step is done and the weights are exported."""
    STOPPED = "stopped"
    """A signal asked for it; the checkpoint is saved and the same command continues from there."""


def clear_outcome(directory: Path) -> None:
    """Forget how an earlier attempt ended, before a new one starts."""
    (directory / OUTCOME_FILE).unlink(missing_ok=True)


def write_outcome(directory: Path, outcome: Outcome, step: int) -> None:
    """Record the end; one rank does."""
    write_small(directory / OUTCOME_FILE, json.dumps({"outcome": outcome, "step": step}))


def read_outcome(directory: Path) -> Outcome | None:
    """Return how the last attempt ended; None if it did not come to its end."""
    try:
        return Outcome(json.loads((directory / OUTCOME_FILE).read_text(encoding="utf-8"))["outcome"])
    except (FileNotFoundError, ValueError, KeyError):
        return None
