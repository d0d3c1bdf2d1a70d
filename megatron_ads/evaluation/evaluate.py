"""One evaluation from recipe to scores: the rows that are held out, a model's answers, their scores, a page of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.config.generation import EndpointConfig, GenerationConfig, Method
from megatron_ads.config.recipes import load_job
from megatron_ads.disk import require_writable
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.comparison import add_comparisons, on_the_same_rows
from megatron_ads.evaluation.datasets import dataset_names
from megatron_ads.evaluation.evaluated_model import open_model
from megatron_ads.evaluation.generate import Asking
from megatron_ads.evaluation.given_answers import GivenAnswers, read_given_answers
from megatron_ads.evaluation.held_out_rows import EvaluationRows, held_out, longest_answers
from megatron_ads.evaluation.page import evaluation_page
from megatron_ads.evaluation.task_scores import task_scores
from megatron_ads.inference.name_answers import AdvertiserNames, names_trained_on, read_names, valid_names


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRequest:
    """What one evaluation is of besides the model, and where its results go."""

    recipe: str
    """Whose held-out rows are answered: a shipped name or a file."""
    overrides: Sequence[str]
    """Settings that replace the recipe's."""
    batch_size: int
    max_new_tokens: int | None = None
    answers_file: Path | None = None
    how: GenerationConfig = field(default_factory=GenerationConfig)
    names_file: Path | None = None
    """Valid names, one a line; None: those of training rows."""
    ground: bool = False
    html_file: Path | None = None
    tokenizer_folder: Path | None = None
    """For a server."""
    compare_file: Path | None = None
    """Another model's answers to the same rows."""
    allow_missing: bool = False
    """Leave rows out that given answers lack."""
    merge_sources: bool = False
    """Score the rows of a task together, whatever sources they are of."""


def evaluate(model: Path | EndpointConfig | GivenAnswers, request: EvaluationRequest) -> dict[str, Any]:
    """Return ``task_scores`` of ``model`` on the rows that the recipe holds out, with the seconds it took.

    Rows of no ads task, such as general conversations, are not answered; their perplexity is under ``general``. An
    answer must reason where the row's own target does. Of answers that were made elsewhere there are neither seconds
    nor perplexities. With ``compare_file``, scores of a task have a ``comparison``.

    Raises:
        ConfigError: If a number is impossible, the recipe does not compose, or no request to a server can succeed.
        DataError: If a file cannot be written, the recipe holds no rows out, the names cannot be used, given answers
            are not those to the rows, or a server stopped answering.
        ConversionError: If transformers cannot load the model.
    """
    _require_possible(model, request)
    data = load_job(request.recipe, request.overrides, sections=["data"]).data
    rows = held_out(data, merge_sources=request.merge_sources)
    advertisers = read_names(request.names_file) if request.names_file else names_trained_on(rows.training)
    if request.how.method is Method.constrained_beam:
        _require_names(rows, advertisers)
    compared = _given(request.compare_file, rows, request) if request.compare_file else None
    seconds: float | None = None
    perplexities: dict[str, dict[str, float]] = {}
    if isinstance(model, GivenAnswers):
        answers = _given(model.file, rows, request)
    else:
        answers, seconds, perplexities = _answered(model, rows, advertisers, data.template_arguments, request)
    if compared is not None:
        answers, compared = on_the_same_rows(answers, compared)
    judge = partial(task_scores, training=rows.training, advertisers=advertisers, ground=request.ground)
    tasks = judge(answers)
    if compared is not None and request.compare_file:
        add_comparisons(tasks, judge(compared), answers, compared, name=request.compare_file.stem)
    scores = {
        "rows": len(answers),
        "seconds": seconds,
        "decoding": None if isinstance(model, GivenAnswers) else str(request.how.method),
        "reasoning": data.reasoning,
        "tasks": tasks,
        "general": perplexities,
    }
    if request.html_file:
        _write_page(request.html_file, model, request, scores, answers)
    return scores


def _answered(
    model: Path | EndpointConfig,
    rows: EvaluationRows,
    advertisers: AdvertiserNames,
    template_arguments: Mapping[str, Any],
    request: EvaluationRequest,
) -> tuple[list[Answer], float, dict[str, dict[str, float]]]:
    """Let a model answer; return the answers, the seconds they took, and the perplexity of general rows by domain."""
    with open_model(model, request.tokenizer_folder, template_arguments) as opened:
        asking = Asking(
            how=request.how,
            max_new_tokens=longest_answers(opened.tokenizer, rows, request.max_new_tokens),
            batch_size=request.batch_size,
            advertisers=advertisers,
            training=rows.training,
        )
        answers, seconds = opened.answer(rows.tasks, asking, request.answers_file)
        general = [replace(row, task=name) for row, name in zip(rows.general, dataset_names(rows.general), strict=True)]
        return answers, seconds, opened.general(general, request.batch_size) if general else {}


def _given(file: Path, rows: EvaluationRows, request: EvaluationRequest) -> list[Answer]:
    return read_given_answers(file, rows.tasks, allow_missing=request.allow_missing)


def _write_page(
    file: Path,
    model: Path | EndpointConfig | GivenAnswers,
    request: EvaluationRequest,
    scores: dict[str, Any],
    answers: Sequence[Answer],
) -> None:
    rows = " ".join([request.recipe, *request.overrides])
    how = "as given" if isinstance(model, GivenAnswers) else f"decoded {request.how.method}"
    about = f"{len(answers)} answers to held-out rows of {rows}, {how}."
    name = (
        model.file if isinstance(model, GivenAnswers) else model.model if isinstance(model, EndpointConfig) else model
    )
    write_small(file, evaluation_page(scores, answers, title=f"Evaluation of {name}", about=about))


def _require_possible(model: Path | EndpointConfig | GivenAnswers, request: EvaluationRequest) -> None:
    """Refuse impossible numbers, and files that cannot be written, before hours are spent on what they are to hold."""
    for option, value in (("--batch-size", request.batch_size), ("--max-new-tokens", request.max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}; it must be at least 1.")
    files = [file for file in (request.answers_file, request.html_file) if file]
    read = [file for file in (model.file if isinstance(model, GivenAnswers) else None, request.compare_file) if file]
    for file in read:
        if not file.is_file():
            raise DataError(f"{file} is no file of answers. Check its path; answers are made with --model or --url.")
    for file in files:
        if not file.parent.is_dir():
            raise DataError(f"{file} cannot be written: there is no folder {file.parent}. Create it.")
        if file.is_dir():
            raise DataError(f"{file} cannot be written: it is a folder. Name a file.")
        if file.resolve() in [given.resolve() for given in read]:
            raise DataError(f"{file} cannot be written: answers are read from it. Name another file.")
    require_writable(*files)


def _require_names(rows: EvaluationRows, advertisers: AdvertiserNames) -> None:
    """Refuse constrained beams where no row is answered with a name."""
    if all(valid_names(row, advertisers) is None for row in rows.tasks):
        held = [*rows.tasks, *rows.general]
        tasks = ", ".join(sorted({row.task for row in held}))
        raise ConfigError(
            f"--decode constrained-beam has no effect: none of the {len(held)} held-out rows, of {tasks}, "
            "is answered with a name; leave it out."
        )
