"""How long a rank's computation has stood still for communication.

All ranks of a synchronous job take equally long for a step: the slow one computes while the others wait for it. What
sets it apart is the time that it does not wait. With gloo the host itself waits. On a GPU the host runs ahead and the
stream of the computation waits, so events in that stream, before and behind each wait, take the time.
"""

import time

import torch


class CpuStalls:
    """Waiting of the host."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._entered = 0.0

    def enter(self) -> None:
        """Begin to wait."""
        self._entered = time.monotonic()

    def leave(self) -> torch.cuda.Event | None:
        """End the wait; there is no event on a CPU."""
        self._seconds += time.monotonic() - self._entered
        return None

    def restart(self, *, measured: bool) -> None:
        """Forget the waits so far; ``measured`` says whether ``seconds`` will be asked for those to come."""
        self._seconds = 0.0

    def seconds(self) -> float:
        """Return the waits since ``restart``."""
        return self._seconds


class CudaStalls:
    """Waiting of the current CUDA stream."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._entered: torch.cuda.Event | None = None
        self._measured = False

    def enter(self) -> None:
        """Mark where the stream begins to wait."""
        self._entered = _mark(timed=True) if self._measured else None

    def leave(self) -> torch.cuda.Event:
        """Mark where the stream goes on; the event is reached when the communication is over."""
        event = _mark(timed=self._entered is not None)
        if self._entered is not None:
            self._pairs.append((self._entered, event))
        return event

    def restart(self, *, measured: bool) -> None:
        """Forget the waits so far; only if ``measured``, ``seconds`` will know those to come."""
        self._pairs.clear()
        self._measured = measured

    def seconds(self) -> float:
        """Return the waits since ``restart``; the host waits for the stream to have come that far."""
        if self._pairs:
            self._pairs[-1][1].synchronize()
        return sum(entered.elapsed_time(left) for entered, left in self._pairs) / 1000


def _mark(*, timed: bool) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=timed)
    event.record()
    return event
