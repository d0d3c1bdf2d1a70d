"""One job of `label` from start to end: its folder, epoch after epoch, and the report.

DIR/labels/000012.parquet    one file an epoch, whole or absent: the result
DIR/questions/               rows that wait for their labels; empty at the end but for how many were read
DIR/journals/000012.jsonl    what was answered of an epoch that is being labelled
DIR/job.json                 what decides the labels; the same job continues, another one is refused
DIR/report.html, .json       what came out
"""

import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from conversion.atomic_file import write_small
from megatron_ads.config.labelling import LabelConfig, RunnerKind
from megatron_ads.data.questions import count_rows
from megatron_ads.data.sources import files_of
from megatron_ads.errors import DataError
from megatron_ads.journal import Journal
from megatron_ads.labelling.label_record import as_table
from megatron_ads.labelling.labeller import Labeller, open_labeller
from megatron_ads.labelling.parquet_files import metadata_of, write_table
from megatron_ads.labelling.question_store import QuestionStore, by_priority
from megatron_ads.labelling.reader_process import reading
from megatron_ads.progress import Progress

OpenModel = Callable[[LabelConfig], AbstractContextManager[Labeller]]
JOURNALS, JOB, LOCK = "journals", "job.json", "job.lock"
_MAY_CHANGE = frozenset(
    [
        "out", "draws", "gpus", "gpu_price_per_second", "baseline_cost", "runner", "ray", "previous", "priorities",
    ]
)  # fmt: skip
"""Settings that change nothing about the labels that are there."""
_OF_MODEL = ("model", "temperature", "top_p", "max_tokens", "template_arguments")
"""Of the model's settings, those that decide what it says; where it is, and how patiently it is asked, may change."""


def run_job(config: LabelConfig, open_model: OpenModel = open_labeller) -> None:
    """Label all rows that have no label yet; what an earlier start of the same job has done is kept.

    Args:
        config: The job.
        open_model: Gives what labels: the recipe's model, unless a test or a benchmark takes another one.

    Raises:
        ConfigError: If a setting cannot work, or no request can succeed.
        DataError: If a source cannot be read, the folder is another job's or in use, or the engine stopped answering.
    """
    out, config = Path(config.out), by_priority(config)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        _require_same_job(out, config)
        store = QuestionStore(out, config)
        (out / JOURNALS).mkdir(exist_ok=True)
        if config.runner is RunnerKind.ray:
            from megatron_ads.labelling.ray_runner import label_on_ray  # Ray is an extra

            for _ in store.read_epochs():
                pass
            label_on_ray(out, config, store.waiting())
            return
        _label_here(out, config, store, open_model)


def _label_here(out: Path, config: LabelConfig, store: QuestionStore, open_model: OpenModel) -> None:
    total = sum(count_rows(source) for source in config.sources)
    with ExitStack() as stack:
        epochs = stack.enter_context(reading(config, store, known=store.waiting()))
        progress = Progress(total, store.rows_passed(), description="labelling", unit="row")
        stack.enter_context(progress)
        labeller: Labeller | None = None
        for epoch in epochs:
            labeller = labeller or stack.enter_context(open_model(config))
            passed = store.rows_passed(epoch) - store.rows_passed(epoch - 1)
            label_epoch(out, store, epoch, labeller)
            progress.update(passed)


def label_epoch(out: Path, store: QuestionStore, epoch: int, labeller: Labeller) -> int:
    """Label the rows of an epoch that waits, and return how many they are; its labels appear when all are there."""
    started = time.monotonic()
    file = out / JOURNALS / f"{epoch:06d}.jsonl"
    questions = store.questions_of(epoch)
    with Journal(file) as journal:
        before = len(journal.records)
        labels = labeller.label(questions, journal)
        about = {
            **metadata_of(store.file(epoch)),
            "seconds": repr(time.monotonic() - started),
            "answered_before": str(before),
            "finished_at": repr(time.time()),
        }
        write_table(store.labels_file(epoch), as_table(labels), about)
        store.file(epoch).unlink()
        journal.delete()
    return len(labels)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"another process labels in {out}. Wait for it, stop it, or choose another --out."
            raise DataError(said) from None
        yield


def _require_same_job(out: Path, config: LabelConfig) -> None:
    """Write down what job a folder is of, or refuse to mix the labels of two.

    Raises:
        DataError: If it is of another job.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in _MAY_CHANGE}
    settings["model"] = {name: settings["model"][name] for name in _OF_MODEL}
    settings["files"] = [
        [part.name, part.file.stat().st_size, part.file.stat().st_mtime_ns]
        for source in config.sources
        for part in (files_of(source) if source.path is not None else [])
    ]
    job = json.loads(json.dumps(settings))
    file = out / JOB
    if not file.exists():
        write_small(file, json.dumps(job, indent=2) + "\n")
        return
    before = json.loads(file.read_bytes())
    if changed := sorted(name for name in {**job, **before} if job.get(name) != before.get(name)):
        raise DataError(
            f"{out} holds the labels of another job: {', '.join(changed)} changed. Choose another --out; with "
            f"'previous=[{out}]' rows that have a label are spared."
        )
