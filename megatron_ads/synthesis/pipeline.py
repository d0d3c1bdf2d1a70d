"""The whole run: rows, golden set, candidates, filters, corpus. Interrupted, it continues where it was.

The corpus is candidates that passed, as chat rows of one form, shuffled, split by group, as JSON lines.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from conversion.atomic_file import write_small
from megatron_ads.config.data import SourceConfig, SourceKind
from megatron_ads.config.generation import AnsweringConfig, ModelKind
from megatron_ads.config.synthesis import SynthesisConfig
from megatron_ads.data.sources import describe_source, read_source
from megatron_ads.data.split import split_by_group
from megatron_ads.errors import DataError
from megatron_ads.inference.client import Answerer, Client
from megatron_ads.inference.endpoint import Endpoint
from megatron_ads.journal import Journal
from megatron_ads.metrics.encoder import sentence_encoder
from megatron_ads.rows import ChatRow, Fact, Message, Role
from megatron_ads.synthesis.candidates import Candidate, Removed, ask_teacher, by_row, passing
from megatron_ads.synthesis.filters import (
    Scorer,
    embedder,
    query_faults,
    remove_disagreeing,
    remove_rejected,
    remove_unlikely,
)
from megatron_ads.synthesis.golden import GoldenResult, check_template
from megatron_ads.synthesis.prompts import drawn, templates_of
from megatron_ads.tasks import query_generation
from megatron_ads.tasks.registry import TASKS, task_named
from megatron_ads.tasks.row_checks import check_rows

TRAINING, VALIDATION = "train.jsonl", "validation.jsonl"
JOURNAL, PERPLEXITIES = "journal.jsonl", "perplexities.jsonl"
UNKNOWN_TASK, GOLDEN_FAILED = "unknown_task", "golden_check_failed"


@dataclass(kw_only=True, slots=True)
class SynthesisResult:
    """What came out."""

    sources: list[str]
    rows_read: int
    rows_left_out: Counter[str]
    """Rows that nothing was asked about, by reason."""
    golden: list[GoldenResult] = field(default_factory=list)
    rows_by_task: dict[str, int] = field(default_factory=dict)
    """Rows that were asked about."""
    candidates: list[Candidate] = field(default_factory=list)
    threshold: float | None = None
    """R of the perplexity filter; None: it was off, or had nothing to measure."""
    written: dict[str, int] | None = None
    """Rows to train on, held out, and on neither side; None: no template passed the golden check: no corpus."""


@dataclass(frozen=True, slots=True)
class SynthesisModels:
    """The models that a run asks."""

    teacher: Client
    verifier: Client | None
    scorer: Scorer | None


@contextmanager
def open_models(config: SynthesisConfig) -> Iterator[SynthesisModels]:
    """Prepare the models and open the journals below ``config.out``.

    Raises:
        ConfigError: If a key is missing, or the model of ``reject.embedding`` cannot be loaded.
        ConversionError: If a folder is no checkpoint.
        DataError: If ``config.out`` cannot be written, another run has a journal open, or a checkpoint has no
            tokenizer.
    """
    out = Path(config.out)
    if config.reject.embedding is not None:
        sentence_encoder(config.reject.embedding, "reject.embedding")  # before anything is paid for
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out} cannot be a folder ({error.strerror}). Choose another one with --out.") from None
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(out / JOURNAL))
        teacher = Client("teacher", config.teacher, _answerer("teacher", config.teacher, stack), journal)
        verifier = scorer = None
        if config.verifier.model is not None:
            verifier = Client("verifier", config.verifier, _answerer("verifier", config.verifier, stack), journal)
        if config.perplexity.model is not None:
            from megatron_ads.synthesis.local_model import LocalScorer  # imports torch

            measured = stack.enter_context(Journal(out / PERPLEXITIES))
            scorer = LocalScorer(config.perplexity, measured, stack)
        yield SynthesisModels(teacher, verifier, scorer)


def _answerer(section: str, config: AnsweringConfig, stack: ExitStack) -> Answerer:
    if config.kind is ModelKind.endpoint:
        return stack.enter_context(closing(Endpoint(section, config)))
    from megatron_ads.synthesis.local_model import LocalTeacher  # imports torch

    return LocalTeacher(config, stack)


def synthesize(config: SynthesisConfig, models: SynthesisModels) -> SynthesisResult:
    """Ask the models for reasoning, filter it, and write the corpus.

    Raises:
        ConfigError: If no request to a model can succeed.
        DataError: If a source cannot be read or has no usable row, ids repeat, a template names an unknown task, or
            a model stopped answering.
    """
    for template in config.templates:
        for task in template.tasks:
            task_named(task)  # an unknown name is an error, not a template without use
    result, tasks = _read_rows(config)
    golden = _golden_rows(config, tasks)
    for task, rows in tasks.items():
        templates = templates_of(task, config.style, config.templates)
        if config.golden.rows > 0:
            results = [check_template(task, item, golden[task], models.teacher, config) for item in templates]
            result.golden += results
            templates = [item for item, checked in zip(templates, results, strict=True) if checked.passed]
        if templates:
            result.rows_by_task[task] = len(rows)
            asked = [
                (row, number, templates[number % len(templates)], number // len(templates))
                for row in rows
                for number in range(config.candidates)
            ]
            result.candidates += ask_teacher(asked, models.teacher, config, description=f"reasoning, {task}")
        else:
            result.rows_left_out[GOLDEN_FAILED] += len(rows)
    _filter(result, models, config)
    if result.rows_by_task:
        result.written = _write_corpus(Path(config.out), passing(result.candidates), config)
    else:  # no corpus of an earlier run is left where a report does not describe it
        for name in (TRAINING, VALIDATION):
            (Path(config.out) / name).unlink(missing_ok=True)
    return result


def _read_rows(config: SynthesisConfig) -> tuple[SynthesisResult, dict[str, list[ChatRow]]]:
    """Return the rows to ask about, by task."""
    tasks: dict[str, list[ChatRow]] = {}
    result = SynthesisResult(
        sources=[describe_source(source) for source in config.sources], rows_read=0, rows_left_out=Counter()
    )
    seen: set[str] = set()
    for source in config.sources:
        checked = check_rows(read_source(source, seed=config.seed))
        result.rows_read += len(checked.rows) + len(checked.faulty)
        result.rows_left_out.update({str(fault): count for fault, count in checked.counts().items()})
        for row in checked.rows:
            if row.id in seen:
                raise DataError(f"{describe_source(source)}: id {row.id!r} is another row's too. Ids must differ.")
            seen.add(row.id)
            if row.task in TASKS:
                tasks.setdefault(row.task, []).append(row)
            else:
                result.rows_left_out[UNKNOWN_TASK] += 1
    if config.reject.queries and query_generation.TASK in tasks:
        _keep_good_queries(tasks, result.rows_left_out, config)
    if not tasks:
        why = ", ".join(f"{reason} {count}" for reason, count in result.rows_left_out.most_common()) or "no rows"
        raise DataError(f"none of the {result.rows_read} rows can be used: {why}. Tasks: {', '.join(TASKS)}.")
    return result, tasks


def _keep_good_queries(tasks: dict[str, list[ChatRow]], left_out: Counter[str], config: SynthesisConfig) -> None:
    """Take rows whose queries break the rules out of ``tasks``."""
    rows = tasks.pop(query_generation.TASK)
    faults = query_faults(rows, config.reject)
    left_out.update(str(fault) for fault in faults if fault)
    if good := [row for row, fault in zip(rows, faults, strict=True) if fault is None]:
        tasks[query_generation.TASK] = good


def _golden_rows(config: SynthesisConfig, tasks: dict[str, list[ChatRow]]) -> dict[str, list[ChatRow]]:
    """Return the golden rows of each task: those of the file, or rows drawn from the sources."""
    pool = tasks
    if config.golden.path is not None:
        source = SourceConfig(kind=SourceKind.jsonl, path=config.golden.path)
        pool = {}
        for row in check_rows(read_source(source, seed=config.seed)).rows:
            pool.setdefault(row.task, []).append(row)
    if lacking := sorted(tasks.keys() - pool.keys()):
        raise DataError(
            f"golden.path = {config.golden.path} has no usable rows of {', '.join(lacking)}. Add some, or set "
            "golden.path to null to draw golden rows from the sources."
        )
    return {
        task: sorted(pool[task], key=lambda row: drawn(config.seed, "golden", row.id))[: config.golden.rows]
        for task in tasks
    }


def _filter(result: SynthesisResult, models: SynthesisModels, config: SynthesisConfig) -> None:
    candidates = result.candidates
    left = passing(candidates)
    if left and (config.reject.min_similarity > 0 or config.reject.max_similarity < 1):
        remove_disagreeing(
            candidates, embedder(config.reject, [candidate.reasoning for candidate in left]), config.reject
        )
    if models.verifier is not None:
        remove_rejected(candidates, models.verifier, config.verifier, seed=config.seed)
    if models.scorer is not None:
        result.threshold = remove_unlikely(candidates, models.scorer, config.perplexity, seed=config.seed)
    if config.keep_per_row is not None:
        for group in by_row(passing(candidates)).values():
            best_first = sorted(group, key=lambda candidate: (candidate.perplexity or 0.0, candidate.number))
            for candidate in best_first[config.keep_per_row :]:
                candidate.remove(Removed.more_than_kept)


def _write_corpus(out: Path, kept: Sequence[Candidate], config: SynthesisConfig) -> dict[str, int]:
    """Write ``train.jsonl`` and, if rows are held out, ``validation.jsonl``; without candidates both are empty."""
    rows = sorted(map(synthesized_row, kept), key=lambda row: drawn(config.seed, "order", row.id))
    training, validation = rows, []
    if config.validation_rows and rows:
        split = split_by_group(rows, validation_rows=config.validation_rows, seed=config.seed)
        training, validation = split.training, split.validation
    _write(out / TRAINING, training)
    if config.validation_rows:
        _write(out / VALIDATION, validation)
    else:
        (out / VALIDATION).unlink(missing_ok=True)  # of an earlier run with other settings, as below
    neither = len(rows) - len(training) - len(validation)
    return {"training_rows": len(training), "validation_rows": len(validation), "left_out_by_split": neither}


def synthesized_row(candidate: Candidate) -> ChatRow:
    """Return the row: the source's question and label, this reasoning, the source's answer."""
    row = candidate.row
    return ChatRow(
        id=candidate.name,
        task=row.task,
        messages=(*row.prompt, Message(Role.assistant, candidate.target)),
        weight=row.weight,
        group=row.group,
        label=row.label,
        facts={**row.facts, Fact.reasoning: candidate.reasoning},
    )


def _write(file: Path, rows: Sequence[ChatRow]) -> None:
    write_small(file, "".join(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in rows))
