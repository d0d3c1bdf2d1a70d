"""The rows of a job, prepared once a node: one rank of each node prepares or finds them, the others wait for it."""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_ads.config.data import DataConfig
from megatron_ads.data.prepared.corpus_record import CorpusRecord
from megatron_ads.data.prepared.prepare import Advance, LoggedAdvance, prepare
from megatron_ads.data.prepared.selection import PreparedData, open_selection, select
from megatron_ads.errors import DataError, MegatronAdsError, one_line
from megatron_ads.runtime.process_groups import job_store

_SECONDS_BETWEEN_LOOKS = 0.2


def prepared_data(data: DataConfig, tokenizer: Path, directory: Path, *, by_task: bool, evaluate: bool) -> PreparedData:
    """Return the rows of a job; ``by_task`` and ``evaluate`` are as in ``select``.

    Where the ranks have met, those of a node agree through the job's store and not by a collective, whose time limit
    is not made for work of minutes or hours.

    Raises:
        DataError: On every rank of the node, if the rows cannot be prepared; on those that wait, if the one they wait
            for makes no progress for ``data.prepare_timeout_seconds``.
    """

    def make(on_advance: Callable[[Advance], None], on_wait: Callable[[int], None] = lambda portions: None) -> Path:
        corpus = prepare(
            data,
            tokenizer,
            directory,
            workers=data.prepare_workers,
            timeout_seconds=data.prepare_timeout_seconds,
            on_advance=on_advance,
            on_wait=on_wait,
        )
        CorpusRecord.read(corpus).tell(data.sources)
        return select(corpus, data, by_task=by_task, evaluate=evaluate)

    if not dist.is_initialized() or dist.get_world_size() == 1:
        folder = make(LoggedAdvance().show)
    else:
        folder = _once_a_node(make, timeout_seconds=data.prepare_timeout_seconds)
    return open_selection(folder, data)


def _once_a_node(
    make: Callable[[Callable[[Advance], None], Callable[[int], None]], Path], *, timeout_seconds: float
) -> Path:
    store, node, progress = job_store("prepared data"), socket.gethostname(), LoggedAdvance()
    done, advanced = f"{node}/done", f"{node}/advanced"
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":

        def show(advance: Advance) -> None:
            progress.show(advance)
            tell(advance.portions)

        def tell(portions: int) -> None:  # of this node, or of another one that it waits for in a shared folder
            store.set(advanced, str(portions))

        store.set(f"{node}/who", f"rank {dist.get_rank()}")
        try:
            folder = make(show, tell)
        except MegatronAdsError as error:
            store.set(done, json.dumps({"error": str(error)}))
            raise
        except BaseException as error:  # the others would wait for hours
            why = f"{type(error).__name__}: {one_line(error)}"
            store.set(done, json.dumps({"error": f"rank {dist.get_rank()}, which prepares the rows, ended: {why}"}))
            raise
        store.set(done, json.dumps({"folder": str(folder)}))
        return folder
    state, changed = "", time.monotonic()
    while not store.check([done]):
        latest = store.get(advanced).decode() if store.check([advanced]) else ""
        if latest != state:
            state, changed = latest, time.monotonic()
        if time.monotonic() - changed > timeout_seconds:
            who = store.get(f"{node}/who").decode() if store.check([f"{node}/who"]) else "the first rank"
            raise DataError(
                f"rank {dist.get_rank()} waits for {who} on {node}, which prepares the rows and has made no progress "
                f"for {timeout_seconds:.0f} s (data.prepare_timeout_seconds), after {state or 'no'} portions. Run "
                "`megatron-ads data prepare` before the job, or raise it."
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    found = json.loads(store.get(done).decode())
    if "error" in found:
        raise DataError(found["error"])
    return Path(found["folder"])
