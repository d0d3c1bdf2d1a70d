"""From answers to numbers, task by task: metrics, an interval of the leading one, and what a baseline gets."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_ads.data.split import group_of
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.label_scores import relevance_scores, score_views
from megatron_ads.evaluation.query_scores import query_scores
from megatron_ads.evaluation.ranking_scores import ranking_scores
from megatron_ads.inference.name_answers import AdvertiserNames, names_trained_on
from megatron_ads.metrics.intervals import ends, statistic_interval
from megatron_ads.rows import ChatRow
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
) -> dict[str, dict[str, Any]]:
    """Return the scores of each task as JSON values; what is undefined is None.

    Query-ad relevance has a form of its own (``relevance_scores``), with the binary views of the papers' tables. Other
    tasks have one form and, where a paper has more on them, ``views``, ``ranking``, ``generated`` or ``replacement``,
    which is ``tasks.model_comparison.replacement_report`` by ``model`` and by ``truth``. ``right_but_for_case`` counts
    answers that could not be read and are the target in other letters: upper case for lower, or the other way round.

    Args:
        answers: Of any tasks.
        training: Rows trained on, from which baselines learn.
        advertisers: Valid names; None: those in ``training``.
        ground: Also judge the valid names nearest to the advertiser that an answer names.
    """
    scores: dict[str, dict[str, Any]] = {}
    for task in sorted({answer.row.task for answer in answers}):
        of_task = [answer for answer in answers if answer.row.task == task]
        trained_on = [row for row in training if row.task == task]
        scores[task] = {"right_but_for_case": sum(map(_is_right_but_for_case, of_task))}
        if task_named(task).scoring is Scoring.labels:
            scores[task] |= relevance_scores(of_task, training=trained_on)
            continue
        scores[task] |= _scores(of_task)
        match task_named(task).scoring:
            case Scoring.user_views:
                scores[task]["views"] = score_views(of_task, training=trained_on)
            case Scoring.rankings:
                names = advertisers or names_trained_on(training)
                scores[task]["ranking"] = ranking_scores(of_task, training, names, ground=ground)
            case Scoring.queries:
                scores[task]["generated"] = query_scores(of_task, trained_on)
            case Scoring.replacement:
                scores[task]["replacement"] = _replacement_scores(of_task)
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
        "ended_share": sum(answer.ended for answer in answers) / len(answers),
    }
