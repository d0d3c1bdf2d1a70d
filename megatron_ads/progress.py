"""What a running command says on stderr: how far it is, and log lines that say which rank speaks.

Rank 0 speaks for the job: a bar on a terminal, one plain line now and then in a log. The other ranks log only when
something is wrong.
"""

import logging
import os
import sys
import time
from typing import Never, Self, TextIO

from tqdm import tqdm

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
        done, total, rate = f"{self._done}", f"{self._total}", f"{seconds_per_step:.2f} s/{self._unit}"
        if self._unit == "B":
            done, total = f"{self._done / 1e9:.2f}", f"{self._total / 1e9:.2f} GB"
            rate = f"{counted / max(elapsed_seconds, 1e-9) / 1e9:.2f} GB/s"
        parts = [f"{self._description} {done}/{total}".strip()]
        parts += [f"{name} {value:.4g}" for name, value in self._values.items()]
        parts.append(rate)
        if left := self._total - self._done:
            parts.append(f"about {readable_duration(left * seconds_per_step)} left")
        return ", ".join(parts)

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


_PROJECT = "megatron_ads"


def rank() -> int:
    """Return the rank of this process as its launcher (torchrun, srun) says; 0 when launched alone."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def world_size() -> int:
    """Return the number of processes of this job as its launcher says; 1 when launched alone."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))


class _StderrAboveBars(logging.Handler):
    """Write each line to stderr, above a progress bar if one is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def start_logging(*, level: int = logging.INFO) -> None:
    """Send this project's log lines to stderr; on ranks other than 0 only warnings and errors.

    A line reads ``14:03:59 [rank 3 of 8] WARNING message``; the rank is left out when there is one process
    and the level when it is INFO. Calling it again replaces the handler, so lines never appear twice.
    """
    logger = logging.getLogger(_PROJECT)
    logger.handlers[:] = [_StderrAboveBars()]
    logger.handlers[0].setFormatter(_RankFormatter(rank(), world_size()))
    logger.setLevel(level if rank() == 0 else max(level, logging.WARNING))
    logger.propagate = False


class _RankFormatter(logging.Formatter):
    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._speaker = f" [rank {rank} of {world_size}]" if world_size > 1 else ""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f" {record.levelname}"
        line = f"{self.formatTime(record, self.datefmt)}{self._speaker}{level} {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def get_logger(module: str) -> logging.Logger:
    """Return the logger of a module (pass ``__name__``); modules outside the package log under the project too."""
    return logging.getLogger(module if module.split(".")[0] == _PROJECT else f"{_PROJECT}.{module}")
