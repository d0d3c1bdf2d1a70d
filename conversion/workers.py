"""Run independent pieces of work in this process or in several, with one shared count of bytes.

Workers are forked from a fresh process that has imported torch and nothing more: torch's threads do not survive a
fork of the caller's process. They exit when their parent is gone.
"""

import ctypes
import multiprocessing
import os
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

import torch

from megatron_ads.errors import ConversionError

Work = TypeVar("Work")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Called with the number of bytes just handled."""

_SECONDS_BETWEEN_LOOKS = 0.2
_counter: "Synchronized[int] | None" = None  # set once in each worker process


def run_all(
    function: Callable[[Work, Advance], Result], pieces: Sequence[Work], *, workers: int, advance: Advance
) -> Iterator[Result]:
    """Yield ``function(piece, advance)`` for every piece, as they finish.

    ``function`` must be a module-level function, or a ``functools.partial`` of one, when there are several workers.

    Raises:
        ConversionError: If a worker process is killed, as the system does when memory runs out.
    """
    if workers == 1 or len(pieces) <= 1:
        for piece in pieces:
            yield function(piece, advance)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conversion.convert", "conversion.verify"])
    counter = context.Value(ctypes.c_longlong, 0)
    workers = min(workers, len(pieces))
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(counter, os.getpid())
    ) as pool:
        pending: set[Future[Result]] = {pool.submit(function, piece, _count) for piece in pieces}
        try:
            yield from _results(pending, counter, advance)
        except BrokenProcessPool:
            raise ConversionError(
                "A worker process was killed; most often the machine ran out of memory. Run again with fewer --workers "
                "(and with --resume, where the command has it)."
            ) from None
        finally:
            for future in pending:
                future.cancel()


def _results(pending: set[Future[Result]], counter: "Synchronized[int]", advance: Advance) -> Iterator[Result]:
    seen = 0
    while pending:
        done, still = wait(pending, timeout=_SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
        pending.intersection_update(still)
        count = int(counter.value)
        advance(count - seen)
        seen = count
        for future in done:
            yield future.result()


def _start_worker(counter: "Synchronized[int]", caller: int) -> None:
    global _counter
    _counter = counter
    torch.set_num_threads(1)
    descriptor = os.pidfd_open(caller)

    def leave_with_caller() -> None:
        select.select([descriptor], [], [])
        os._exit(1)

    threading.Thread(target=leave_with_caller, daemon=True).start()


def _count(nbytes: int) -> None:
    assert _counter is not None
    with _counter.get_lock():
        _counter.value += nbytes
