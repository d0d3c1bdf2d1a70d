"""One evaluation from recipe to scores: the rows that are held out, a model's answers, their scores, a page of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.config.data import DataConfig
from megatron_ads.config.generation import EndpointConfig
from megatron_ads.config.recipes import load_job
from megatron_ads.evaluation.ablation import add_ablations, rows_without_sections
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.datasets import dataset_names
from megatron_ads.evaluation.evaluated_model import open_model
from megatron_ads.evaluation.generate import Asking
from megatron_ads.evaluation.given_answers import GivenAnswers, read_given_answers
from megatron_ads.evaluation.held_out_rows import longest_answers
from megatron_ads.evaluation.judging import Judging
from megatron_ads.evaluation.page import evaluation_page
from megatron_ads.evaluation.request import EvaluationRequest
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)


def evaluate(model: Path | EndpointConfig | GivenAnswers, request: EvaluationRequest) -> dict[str, Any]:
    """Return ``task_scores`` of ``model`` on the rows that the recipe holds out, with the seconds it took.

    Rows of no ads task, such as general conversations, are not answered; their perplexity is under ``general``. An
    answer must reason where the row's own target does. Of answers that were made elsewhere there are neither seconds
    nor perplexities. Scores of a task have a ``comparison``, or an ``ablation``, where one is asked for.

    Raises:
        ConfigError: If a number is impossible, the recipe does not compose, or no request to a server can succeed.
        DataError: If a file cannot be written, the recipe holds no rows out, the names cannot be used, given answers
            are not those to the rows, or a server stopped answering.
        ConversionError: If transformers cannot load the model.
    """
    request.check([model.file] if isinstance(model, GivenAnswers) else [])
    data = load_job(request.recipe, request.overrides, sections=["data"]).data
    judging = Judging.prepare(data, request)
    if isinstance(model, GivenAnswers):
        given = read_given_answers(model.file, judging.rows.tasks, allow_missing=request.allow_missing)
        scores, answers = _scores(judging, given, seconds=None)
        if unread := len(judging.rows.general):
            logger.warning("The perplexity of %d general rows is not measured: no model is asked.", unread)
    else:
        scores, answers = _asked(model, data, judging, request)
    scores["decoding"] = None if isinstance(model, GivenAnswers) else str(request.how.method)
    scores["reasoning"] = data.reasoning
    if request.html_file:
        _write_page(request.html_file, model, request, scores, answers)
    return scores


def _scores(
    judging: Judging, answers: Sequence[Answer], *, seconds: float | None
) -> tuple[dict[str, Any], Sequence[Answer]]:
    tasks, answers = judging.scores(answers)
    return {"rows": len(answers), "seconds": seconds, "tasks": tasks, "general": {}}, answers


def _asked(
    model: Path | EndpointConfig, data: DataConfig, judging: Judging, request: EvaluationRequest
) -> tuple[dict[str, Any], Sequence[Answer]]:
    """Let a model answer, and again without each section of histories if that is asked for; return scores, answers."""
    rows, file = judging.rows, request.answers_file
    without = rows_without_sections(data, rows.tasks) if request.ablate_history else {}
    with open_model(model, request.tokenizer_folder, data.template_arguments) as opened:
        asking = Asking(
            how=request.how,
            max_new_tokens=longest_answers(opened.tokenizer, rows, request.max_new_tokens),
            batch_size=request.batch_size,
            advertisers=judging.advertisers,
            training=rows.training,
        )
        everything, seconds = opened.answer(rows.tasks, asking, file)
        general = [replace(row, task=name) for row, name in zip(rows.general, dataset_names(rows.general), strict=True)]
        perplexities = opened.general(general, request.batch_size) if general else {}
        ablated = {
            section: opened.answer(
                of_section, asking, file and file.with_name(f"{file.stem}.without-{section}{file.suffix}")
            )[0]
            for section, of_section in without.items()
        }
    scores, answers = _scores(judging, everything, seconds=seconds)
    if request.ablate_history:
        add_ablations(scores["tasks"], everything, ablated)
    return scores | {"general": perplexities}, answers


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
    match model:
        case GivenAnswers():
            title = f"Evaluation of {model.file}"
        case EndpointConfig():
            title = f"Evaluation of {model.model}"
        case _:
            title = f"Evaluation of {model}"
    write_small(file, evaluation_page(scores, answers, title=title, about=about))
