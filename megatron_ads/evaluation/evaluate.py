"""One evaluation from recipe to scores: the rows that are held out, a model's answers, their scores, a page of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.config.data import DataConfig
from megatron_ads.config.generation import EndpointConfig, GenerationConfig, Method
from megatron_ads.config.recipes import load_job
from megatron_ads.data.chat import ChatTokenizer
from megatron_ads.data.corpus import read_corpus
from megatron_ads.disk import require_writable
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.evaluated_model import open_model
from megatron_ads.evaluation.generate import Asking
from megatron_ads.evaluation.page import evaluation_page
from megatron_ads.evaluation.task_scores import task_scores
from megatron_ads.inference.name_answers import AdvertiserNames, names_trained_on, read_names, valid_names
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.registry import TASKS

MARGIN = 1.25
"""How much longer than the longest training target an answer may become."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRows:
    """The rows of a recipe that an evaluation needs."""

    tasks: list[ChatRow]
    """Held out, of ads tasks: a model answers them."""
    general: list[ChatRow]
    """Held out, of no ads task, such as conversations: the perplexity of their targets is measured."""
    training: list[ChatRow]


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


def evaluate(model: Path | EndpointConfig, request: EvaluationRequest) -> dict[str, Any]:
    """Return ``task_scores`` of ``model`` on the rows that the recipe holds out, with the seconds it took.

    Rows of no ads task, such as general conversations, are not answered; their perplexity is under ``general``. An
    answer must reason where the row's own target does.

    Raises:
        ConfigError: If a number is impossible, the recipe does not compose, or no request to a server can succeed.
        DataError: If a file cannot be written, the recipe holds no rows out, the names cannot be used, or a server
            stopped answering.
        ConversionError: If transformers cannot load the model.
    """
    _require_possible(request)
    data = load_job(request.recipe, request.overrides, sections=["data"]).data
    rows = held_out(data)
    advertisers = read_names(request.names_file) if request.names_file else names_trained_on(rows.training)
    if request.how.method is Method.constrained_beam:
        _require_names(rows, advertisers)
    with open_model(model, request.tokenizer_folder, data.template_arguments) as opened:
        asking = Asking(
            how=request.how,
            max_new_tokens=longest_answers(opened.tokenizer, rows, request.max_new_tokens),
            batch_size=request.batch_size,
            advertisers=advertisers,
            training=rows.training,
        )
        answers, seconds = opened.answer(rows.tasks, asking, request.answers_file)
        perplexities = opened.general(rows.general, request.batch_size) if rows.general else {}
    scores = {
        "rows": len(answers),
        "seconds": seconds,
        "decoding": str(request.how.method),
        "reasoning": data.reasoning,
        "tasks": task_scores(answers, rows.training, advertisers, ground=request.ground),
        "general": perplexities,
    }
    if request.html_file:
        _write_page(request.html_file, model, request, scores, answers)
    return scores


def _write_page(
    file: Path,
    model: Path | EndpointConfig,
    request: EvaluationRequest,
    scores: dict[str, Any],
    answers: Sequence[Answer],
) -> None:
    rows = " ".join([request.recipe, *request.overrides])
    about = f"{len(answers)} answers to held-out rows of {rows}, decoded {request.how.method}."
    title = f"Evaluation of {model if isinstance(model, Path) else model.model}"
    write_small(file, evaluation_page(scores, answers, title=title, about=about))


def _require_possible(request: EvaluationRequest) -> None:
    """Refuse impossible numbers, and files that cannot be written, before hours are spent on what they are to hold."""
    for option, value in (("--batch-size", request.batch_size), ("--max-new-tokens", request.max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}; it must be at least 1.")
    files = [file for file in (request.answers_file, request.html_file) if file]
    for file in files:
        if not file.parent.is_dir():
            raise DataError(f"{file} cannot be written: there is no folder {file.parent}. Create it.")
        if file.is_dir():
            raise DataError(f"{file} cannot be written: it is a folder. Name a file.")
    require_writable(*files)


def held_out(data: DataConfig) -> EvaluationRows:
    """Read the rows of a recipe's ``data`` section.

    Raises:
        DataError: If it holds none out.
    """
    corpus = read_corpus(data)
    if not corpus.validation:
        raise DataError("the recipe holds no rows out; raise data.validation_rows.")
    return EvaluationRows(
        tasks=[row for row in corpus.validation if row.task in TASKS],
        general=[row for row in corpus.validation if row.task not in TASKS],
        training=[row for rows in corpus.training for row in rows],
    )


def _require_names(rows: EvaluationRows, advertisers: AdvertiserNames) -> None:
    """Refuse constrained beams where no row is answered with a name."""
    if all(valid_names(row, advertisers) is None for row in rows.tasks):
        held = [*rows.tasks, *rows.general]
        tasks = ", ".join(sorted({row.task for row in held}))
        raise ConfigError(
            f"--decode constrained-beam has no effect: none of the {len(held)} held-out rows, of {tasks}, "
            "is answered with a name; leave it out."
        )


def longest_answers(tokenizer: ChatTokenizer | None, rows: EvaluationRows, given: int | None) -> dict[str, int]:
    """Return the limit of each task in tokens: ``given``, or what the model was taught to say there and ``MARGIN``.

    Raises:
        ConfigError: If none is given and there is no tokenizer to count what was taught.
    """
    tasks = {row.task for row in (*rows.tasks, *rows.general)}
    if given:
        return dict.fromkeys(tasks, given)
    if tokenizer is None:
        raise ConfigError(
            "--url needs --max-new-tokens N, or --tokenizer DIR, by which the length of training targets is counted."
        )
    taught = dict.fromkeys(tasks, 0)
    for row in rows.training:
        taught[row.task] = max(taught.get(row.task, 0), len(tokenizer.encode(row.target)))
    # A task that is held out only may say as much as any other.
    return {task: round(MARGIN * (taught[task] or max(taught.values()))) + 1 for task in tasks}
