"""How long the phases of a step take, by verl's metric names."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimes:
    """Seconds of each phase since they were last taken; a phase that ends with a collective is as long as the slowest
    rank's."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measured(self, phase: str) -> Iterator[None]:
        """Add the time inside the context to a phase."""
        started = time.monotonic()
        yield
        self._seconds[phase] += time.monotonic() - started

    def take(self) -> dict[str, float]:
        """Return the seconds by metric name, and begin anew."""
        taken = {f"timing_s/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken
