"""From answers to numbers, task by task: metrics, an interval of the leading one, and what a baseline gets."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_ads.data.split import group_of
from megatron_ads.downstream.pipeline import Pipeline
from megatron_ads.evaluation.answer_records import Answer, ended_share
from megatron_ads.evaluation.ctcvr_scores import ctcvr_scores
from megatron_ads.evaluation.datasets import dataset_names, rows_beside
from megatron_ads.evaluation.label_scores import relevance_scores, score_views
from megatron_ads.evaluation.query_scores import query_scores
from megatron_ads.evaluation.ranking_scores import ranking_scores
from megatron_ads.inference.name_answers import AdvertiserNames, names_trained_on
from megatron_ads.metrics.intervals import ends, statistic_interval
from megatron_ads.metrics.text import format_rates
from megatron_ads.rows import ChatRow
from megatron_ads.tasks import next_item
from megatron_ads.tasks.answer_format import ReadFailure, split_reasoning
from megatron_ads.tasks.ground_truth import ground_truth
from megatron_ads.tasks.model_comparison import Assessment, replacement_report
from megatron_ads.tasks.registry import Scoring, read_answer, score_answers, task_named

_RESAMPLES = 200
"""Each scores all answers anew."""


def task_scores(
    answers: Sequence[Answer],
    training: Sequence[ChatRow],
    advertisers: AdvertiserNames | None = None,
    *,
    ground: bool = False,
    pipeline: Pipeline | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the scores of each dataset as JSON values, by ``dataset_names``; what is undefined is None.

    Each has its ``task`` and, where it is known, ``dataset``: the name of the source of the rows.

    Query-ad relevance has a form of its own (``relevance_scores``), with the binary views of the papers' tables. Other
    tasks have one form and, where a paper has more on them, ``views``, ``ranking``, ``generated`` or ``replacement``,
    which is ``tasks.model_comparison.replacement_report`` by ``model`` and by ``truth``. ``right_but_for_case`` counts
    answers that could not be read and are the target in other letters: upper case for lower, or the other way round.

    Args:
        answers: Of any tasks.
        training: Rows trained on, from which baselines learn: those of the same source, where it has any.
        advertisers: Valid names; None: those in ``training``.
        ground: Also judge the valid names nearest to the advertiser that an answer names.
        pipeline: Its ranker says the CTCVR of the items that answers name.
    """
    datasets: dict[str, list[Answer]] = defaultdict(list)
    for answer, name in zip(answers, dataset_names([answer.row for answer in answers]), strict=True):
        datasets[name].append(answer)
    names = advertisers or names_trained_on(training)
    scores = {
        name: _dataset_scores(datasets[name], rows_beside(datasets[name], training), names, ground=ground)
        for name in sorted(datasets)
    }
    for name, of_dataset in scores.items():
        if pipeline and (ctcvr := ctcvr_scores(datasets[name], pipeline)):
            of_dataset["ctcvr"] = ctcvr
    return scores


def _dataset_scores(
    answers: Sequence[Answer], training: Sequence[ChatRow], names: AdvertiserNames, *, ground: bool
) -> dict[str, Any]:
    sources = {answer.row.source for answer in answers} - {""}
    task = task_named(answers[0].row.task)
    scores: dict[str, Any] = {"task": task.name, "dataset": min(sources) if len(sources) == 1 else None}
    scores["right_but_for_case"] = sum(map(_is_right_but_for_case, answers))
    if task.scoring is Scoring.labels:
        formats = format_rates([answer.text for answer in answers])
        return {**scores, **relevance_scores(answers, training=training), "formats": formats}
    scores |= _scores(answers)
    match task.scoring:
        case Scoring.user_views:
            scores["views"] = score_views(answers, training=training)
        case Scoring.rankings:
            known = replace(names, names=names.items) if task.name == next_item.TASK else names
            scores["ranking"] = ranking_scores(answers, training, known, ground=ground)
        case Scoring.queries:
            scores["generated"] = query_scores(answers, training)
        case Scoring.replacement:
            scores["replacement"] = _replacement_scores(answers)
    return scores


def _replacement_scores(answers: Sequence[Answer]) -> dict[str, Any]:
    groups = [group_of(answer.row) for answer in answers]
    model = [read_answer(answer.row, answer.text) for answer in answers]
    truth = [ground_truth(answer.row, Assessment) for answer in answers]
    return {
        name: asdict(replacement_report(assessments, groups=groups))
        for name, assessments in (("model", model), ("truth", truth))
    }


def _is_right_but_for_case(answer: Answer) -> bool:
    if not isinstance(read_answer(answer.row, answer.text), ReadFailure):
        return False
    said, target = (split_reasoning(text, required=False) for text in (answer.text, answer.row.target))
    if isinstance(said, ReadFailure) or isinstance(target, ReadFailure):
        return False
    return said.answer != target.answer and said.answer.casefold() == target.answer.casefold()


def _scores(answers: Sequence[Answer]) -> dict[str, Any]:
    rows, texts = [answer.row for answer in answers], [answer.text for answer in answers]
    scores = score_answers(rows, texts)
    leading = scores.headline_name

    def headline(numbers: Any) -> float | None:
        drawn = [int(number) for number in numbers]
        found = score_answers([rows[number] for number in drawn], [texts[number] for number in drawn])
        return found.metrics.get(leading or "")

    groups = [group_of(row) for row in rows]
    interval = statistic_interval(headline, len(rows), groups=groups, resamples=_RESAMPLES) if leading else None
    return {
        **asdict(scores),
        "groups": len(set(groups)),
        "headline_95": ends(interval),
        "ended_share": ended_share(answers),
    }
