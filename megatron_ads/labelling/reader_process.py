"""The rows of a job are read by a process of their own, a few epochs ahead of the model that labels them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_ads.config.labelling import LabelConfig
from megatron_ads.errors import ConfigError, DataError, MegatronAdsError, as_refusals
from megatron_ads.labelling.parquet_files import remove_partial
from megatron_ads.labelling.question_store import QUESTIONS, QuestionStore

EPOCHS_AHEAD = 4
EPOCHS_READ_HERE = 1
_SECONDS_BETWEEN_LOOKS = 5.0
_NAMED = {"ConfigError": ConfigError, "DataError": DataError}


@contextmanager
def reading(config: LabelConfig, store: QuestionStore, *, known: Sequence[int]) -> Iterator[Iterator[int]]:
    """Yield the epochs to be labelled, in order: those that are on disk, then those that are read meanwhile.

    The first of those is read here, so that a small job waits for no process to start.
    """
    with _Reader(config) as reader:
        yield _epochs(store, known, reader)


def _epochs(store: QuestionStore, known: Sequence[int], reader: "_Reader") -> Iterator[int]:
    yield from known
    if store.all_read() is None:
        yield from store.read_epochs(stop_after=EPOCHS_READ_HERE)
    if store.all_read() is None:
        yield from reader.epochs()


class _Reader:
    """The process, which ends with this one whatever happens: it reads no further than it is asked to."""

    def __init__(self, config: LabelConfig) -> None:
        self._config = config
        self._process: multiprocessing.process.BaseProcess | None = None
        self._ours: Connection | None = None

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours is not None:
            self._ours.close()
        if self._process is not None:
            self._process.kill()  # its files appear whole or not at all
            self._process.join()
            remove_partial(Path(self._config.out) / QUESTIONS)

    def epochs(self) -> Iterator[int]:
        """Start, and yield the number of each epoch.

        Raises:
            MegatronAdsError: What the process raised.
            DataError: If it ended without a word.
        """
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_read, args=(self._config, theirs), daemon=True, name="reader")
        # Ctrl-C goes to all processes of a terminal; this one is ended by whoever started it, without a traceback. The
        # tracker comes first: where it has to be started, it unblocks the signal again.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        for _ in range(EPOCHS_AHEAD):
            self._ask()
        while (said := self._next()) is not None:
            yield said
            self._ask()

    def _ask(self) -> None:
        assert self._ours is not None
        with suppress(OSError):  # it has read everything and is gone; what it said is still to be received
            self._ours.send("go on")

    def _next(self) -> int | None:
        assert self._ours is not None and self._process is not None
        while not self._ours.poll(_SECONDS_BETWEEN_LOOKS):
            if not self._process.is_alive():
                break
        try:
            kind, value = self._ours.recv()
        except (EOFError, OSError):
            raise DataError(
                "the process that reads the rows ended without a word (killed, or out of memory). Start again: labels "
                "that are there are kept."
            ) from None
        if kind == "failed":
            name, message = value
            raise _NAMED.get(name, MegatronAdsError)(message)
        return int(value) if kind == "epoch" else None


def _read(config: LabelConfig, connection: Connection) -> None:
    """Read on, in the process: an epoch for each time that it is told to go on."""
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    epochs = QuestionStore(Path(config.out), config).read_epochs()
    with suppress(EOFError, OSError):  # of the connection: whoever asked is gone
        while connection.recv():
            said = _next_of(epochs)
            connection.send(said)
            if said[0] != "epoch":
                return


def _next_of(epochs: Iterator[int]) -> tuple[str, object]:
    try:
        with as_refusals():
            epoch = next(epochs, None)
    except MegatronAdsError as error:
        return "failed", (type(error).__name__, str(error))
    return ("done", None) if epoch is None else ("epoch", epoch)


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, however far the next epoch is."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "it was started by one"
    parent.join()
    os._exit(1)
