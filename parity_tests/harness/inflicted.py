"""A fault in a rank of a job, at a chosen moment, and a record of what the ranks generated.

Ranks that are forked from this process inside ``inflicted`` have both; the code that runs in them knows of neither.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Timer
from typing import Any
from unittest.mock import patch

from megatron_ads.journal import Journal
from megatron_ads.training.rollout.metrics import PhaseTimes


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that one rank does to itself or its surroundings in the middle of a phase of a step."""

    rank: int
    phase: str
    """``rollout``, ``reward``, ``update`` or ``sync``: a phase of ``PhaseTimes``."""
    step: int
    """Counted from the start of the process."""
    delay_seconds: float
    """After the phase began; at its end, if that comes earlier."""
    strike: Callable[[], None]


@contextmanager
def inflicted(fault: Fault | None, generated: Path) -> Iterator[None]:
    """Let the ranks that are forked inside suffer ``fault``, and write a line to ``generated`` for each finished chunk.

    A line is the journal's key of the chunk: of the weights, the prompts and the settings that it was generated with.
    """
    add, measured, entered = Journal.add, PhaseTimes.measured, Counter[str]()

    def add_and_tell(journal: Journal, key: str, record: Any) -> None:
        add(journal, key, record)
        with generated.open("a") as file:
            file.write(f"{key}\n")

    @contextmanager
    def measured_with_fault(times: PhaseTimes, phase: str) -> Iterator[None]:
        entered[phase] += 1
        struck = fault is not None and (int(os.environ["RANK"]), phase, entered[phase]) == (
            fault.rank,
            fault.phase,
            fault.step,
        )
        with measured(times, phase), _striking(fault if struck else None):
            yield

    with patch.object(Journal, "add", add_and_tell), patch.object(PhaseTimes, "measured", measured_with_fault):
        yield


@contextmanager
def _striking(fault: Fault | None) -> Iterator[None]:
    if fault is None:
        yield
        return
    struck, only_once = False, Lock()

    def strike() -> None:  # whoever comes second waits until it has happened
        nonlocal struck
        with only_once:
            if not struck:
                struck = True
                fault.strike()

    timer = Timer(fault.delay_seconds, strike)
    timer.daemon = True
    if fault.delay_seconds:
        timer.start()
    else:
        strike()
    try:
        yield
    finally:
        strike()


def signal_oneself(number: signal.Signals) -> Callable[[], None]:
    """Return what sends a signal to the process that calls it."""
    return lambda: os.kill(os.getpid(), number)


def fill_disk(folder: Path) -> None:
    """Leave no space on the file system of ``folder``; remove ``folder/filler`` to have it back."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
