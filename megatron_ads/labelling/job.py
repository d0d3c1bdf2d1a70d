"""One job of `label` from start to end: its folder, epoch after epoch, and the report.

DIR/labels/000012.parquet    one file an epoch, whole or absent: the result
DIR/questions/               rows that wait for their labels; empty at the end but for how many were read
DIR/journals/000012.jsonl    what was answered of an epoch that is being labelled
DIR/job.json                 what decides the labels: ``job_identity``
DIR/report.html, .json       what came out
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from megatron_ads.config.labelling import LabelConfig, RunnerKind
from megatron_ads.data.questions import count_rows
from megatron_ads.errors import DataError
from megatron_ads.labelling.job_identity import require_same_job, tell_of_previous
from megatron_ads.labelling.labeller import Labeller, open_labeller
from megatron_ads.labelling.question_store import QuestionStore
from megatron_ads.labelling.reader_process import reading
from megatron_ads.progress import Progress

OpenModel = Callable[[LabelConfig], AbstractContextManager[Labeller]]
LOCK = "job.lock"


def run_job(config: LabelConfig, open_model: OpenModel = open_labeller) -> None:
    """Label all rows that have no label yet; what an earlier start of the same job has done is kept.

    Args:
        config: The job.
        open_model: Gives what labels: the recipe's model, unless a test or a benchmark takes another one.

    Raises:
        ConfigError: If a setting cannot work, or no request can succeed.
        DataError: If a source cannot be read, the folder is another job's or in use, or the engine stopped answering.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        store = _open_store(out, config)
        if config.runner is RunnerKind.ray:
            from megatron_ads.labelling.ray_runner import label_on_ray  # Ray is an extra

            for _ in store.read_epochs():
                pass
            label_on_ray(out, config, store.waiting())
            return
        _label_here(out, config, store, open_model)


def _open_store(out: Path, config: LabelConfig) -> QuestionStore:
    """Return what was read so far, if that was for this job, in order again after whatever ended the last start."""
    store = QuestionStore(out, config)
    has_answers = store.is_labelled or any(file.stat().st_size for file in store.journals.iterdir())
    if not require_same_job(out, config, has_answers=has_answers):
        store.clear()
    store.require_whole()
    for file in store.journals.glob("*.jsonl"):
        if store.labels_file(int(file.stem)).exists():
            file.unlink()
    if store.all_read() is None:
        tell_of_previous(config)
    return store


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
            labeller.label_epoch(store, epoch)
            progress.update(passed)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"another process labels in {out}. Wait for it, stop it, or choose another --out."
            raise DataError(said) from None
        yield
