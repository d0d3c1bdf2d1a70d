"""How far a job is: a bar on a terminal, one plain line now and then in a log, nothing on ranks other than 0."""

import sys
import time
from typing import Never, Self, TextIO

from tqdm import tqdm

from megatron_ads.layout import rank

LINE_INTERVAL_SECONDS = 10.0


class Progress:
    """Counts from ``initial`` to ``total``. The bar or the lines go to stderr, so that stdout stays for results."""

    def __init__(
        self,
        total: int,
        initial: int = 0,
        description: str = "",
        *,
        stream: TextIO | None = None,
        unit: str = "step",
        shown: bool = True,
    ) -> None:
        """Start counting; a resumed job passes the steps already done as ``initial``. ``unit`` "B" counts bytes."""
        self._stream = stream or sys.stderr
        self._description, self._unit = description, unit
        self._total, self._initial, self._done = total, initial, initial
        self._least = max(min(3, total), total // 100 if unit == "B" else 0)
        """Counts that tell how long the rest will take: the first step is slow, and the first file small."""
        self._values: dict[str, float] = {}
        self._started = time.monotonic()
        self._last_line = float("-inf")
        self._speaks = shown and rank() == 0
        self._bar = self._open_bar() if self._speaks and self._stream.isatty() else None

    def _open_bar(self) -> "tqdm[Never]":
        return tqdm(
            total=self._total,
            initial=self._initial,
            desc=self._description,
            unit=self._unit,
            unit_scale=self._unit == "B",
            file=self._stream,
            dynamic_ncols=True,
        )

    def update(self, steps: int = 1, **values: float) -> None:
        """Count ``steps`` more, and show ``values``, such as ``loss=1.25``, next to the count."""
        self._done += steps
        self._values.update(values)
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in self._values.items()}, refresh=False)
            self._bar.update(steps)
        elif self._speaks:
            self._print_line_when_due()

    def _print_line_when_due(self) -> None:
        now = time.monotonic()
        if now - self._last_line >= LINE_INTERVAL_SECONDS or self._done >= self._total:
            self._last_line = now
            print(self._line(now - self._started), file=self._stream, flush=True)

    def _line(self, elapsed_seconds: float) -> str:
        counted = max(self._done - self._initial, 1)
        seconds_per_step = elapsed_seconds / counted
        done, total, rate = f"{self._done}", f"{self._total}", self._rate(counted / max(elapsed_seconds, 1e-9))
        if self._unit == "B":
            done, total = f"{self._done / 1e9:.2f}", f"{self._total / 1e9:.2f} GB"
            rate = f"{counted / max(elapsed_seconds, 1e-9) / 1e9:.2f} GB/s"
        parts = [f"{self._description} {done}/{total}".strip()]
        parts += [f"{name} {value:.4g}" for name, value in self._values.items()]
        parts.append(rate)
        left = self._total - self._done
        if left and elapsed_seconds >= LINE_INTERVAL_SECONDS and counted >= self._least:
            parts.append(f"about {readable_duration(left * seconds_per_step)} left")
        return ", ".join(parts)

    def _rate(self, per_second: float) -> str:
        if per_second > 1:
            return f"{per_second:.0f} {self._unit}s/s" if per_second >= 100 else f"{per_second:.3g} {self._unit}s/s"
        return f"{1 / per_second:.2f} s/{self._unit}"

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._started

    def close(self) -> None:
        """Leave the finished bar on the screen and end its line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def readable_duration(seconds: float) -> str:
    """Write a duration as people say it: ``8.4 s``, ``2 min 05 s``, ``3 h 20 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
