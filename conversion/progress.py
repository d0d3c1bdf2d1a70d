"""Show how far a long pass over many bytes has come: a bar on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 20.0


class ByteProgress:
    """Counts bytes up to a total. Use as a context manager."""

    def __init__(self, what: str, total_bytes: int, *, shown: bool = True) -> None:
        self._what = what
        self._total = total_bytes
        self._started = self._last_line = time.monotonic()
        self._shown = shown
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_bytes, desc=what, unit="B", unit_scale=True, disable=not (shown and self._on_terminal)
        )
        self.done = 0

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, nbytes: int) -> None:
        """Add bytes."""
        self.done += nbytes
        self._bar.update(nbytes)
        now = time.monotonic()
        if self._shown and not self._on_terminal and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = self.done / (now - self._started)
            left = (self._total - self.done) / rate if rate else 0.0
            sys.stderr.write(
                f"{self._what}: {self.done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, "
                f"{left:.0f} s left\n"
            )

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started
