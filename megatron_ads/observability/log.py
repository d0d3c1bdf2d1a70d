"""Log lines that say which rank speaks. Rank 0 speaks for the job; the others only when something is wrong."""

import logging
import sys

from tqdm import tqdm

from megatron_ads.layout import rank, world_size

_PROJECT = "megatron_ads"


class _StderrAboveBars(logging.Handler):
    """Write each line to stderr, above a progress bar if one is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        record.level = "" if record.levelno == logging.INFO else f" {record.levelname}"
        tqdm.write(self.format(record), file=sys.stderr)


def start_logging(*, level: int = logging.INFO) -> None:
    """Send this project's log lines to stderr; on ranks other than 0 only warnings and errors.

    A line reads ``14:03:59 [rank 3 of 8] WARNING message``; the rank is left out where there is one process, and the
    level where it is INFO.
    """
    logger = logging.getLogger(_PROJECT)
    logger.handlers[:] = [_StderrAboveBars()]
    speaker = f" [rank {rank()} of {world_size()}]" if world_size() > 1 else ""
    logger.handlers[0].setFormatter(logging.Formatter(f"%(asctime)s{speaker}%(level)s %(message)s", "%H:%M:%S"))
    logger.setLevel(level if rank() == 0 else max(level, logging.WARNING))
    logger.propagate = False


def get_logger(module: str) -> logging.Logger:
    """Return the logger of a module (pass ``__name__``); modules outside the package log under the project too."""
    return logging.getLogger(module if module.split(".")[0] == _PROJECT else f"{_PROJECT}.{module}")
