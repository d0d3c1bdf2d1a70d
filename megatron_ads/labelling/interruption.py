"""A job that is told to end, by Ctrl-C or SIGTERM, ends soon: answers on their way are waited for, but not for long.

Nothing is lost by an end at any moment: files appear whole or not at all, and answers are on disk as they come.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

LONGEST_WAIT_SECONDS = 10.0
INTERRUPTED = 130


@contextmanager
def ending_soon(longest_wait_seconds: float = LONGEST_WAIT_SECONDS) -> Iterator[None]:
    """Turn the first signal to end into ``KeyboardInterrupt``; a second one, or the end of the wait, ends the process.

    Only the main thread of a process may enter.
    """

    def end() -> NoReturn:
        if inside:
            sys.stderr.write("megatron-ads: interrupted\n")
        os._exit(INTERRUPTED)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if told:
            end()
        told.append(number)
        timer.start()
        raise KeyboardInterrupt

    told: list[int] = []
    inside = True
    timer = threading.Timer(longest_wait_seconds, end)
    timer.daemon = True
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        inside = False
        if not told:  # else threads may still wait for their answers when all else has ended
            for number, handler in before.items():
                signal.signal(number, handler)
