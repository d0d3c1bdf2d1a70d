"""A model beside another one on the same rows: the papers' Delta, and how far it could be chance.

    Delta = score of the model - score of the other      relative change = Delta / score of the other

Intervals are of a paired bootstrap: a resample draws groups of rows, such as the rows of a user, and both models are
scored on the same ones.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.split import group_of
from megatron_ads.downstream.pipeline import Pipeline
from megatron_ads.errors import DataError
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.ctcvr_scores import ctcvr_by_rows
from megatron_ads.evaluation.datasets import dataset_names, rows_beside
from megatron_ads.evaluation.query_scores import query_values
from megatron_ads.evaluation.ranking_scores import LONGEST, found_by_rows
from megatron_ads.metrics.intervals import ends, mean_interval, percentile_interval, resampled_rows
from megatron_ads.metrics.ranking import mean
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.registry import Scoring, read_answer, task_named

_RESAMPLES = 500
_BESIDE_HEADLINES = ("accuracy", "auc")

Values = Mapping[str, float | None]
"""By the name of the metric."""
Score = Callable[[NDArray[np.int64]], Values]
"""Takes the numbers of some rows, which may repeat."""


def on_the_same_rows(answers: Sequence[Answer], compared: Sequence[Answer]) -> tuple[list[Answer], list[Answer]]:
    """Return the answers of two models to the rows that both answered, in one order.

    Raises:
        DataError: If there are none.
    """
    by_row = {id(answer.row): answer for answer in compared}
    both = [(answer, by_row[id(answer.row)]) for answer in answers if id(answer.row) in by_row]
    if not both and answers:
        raise DataError("the models that are compared answered no row in common. Compare answers to the same rows.")
    return [answer for answer, _ in both], [other for _, other in both]


def add_comparisons(
    scores: dict[str, dict[str, Any]],
    compared_scores: Mapping[str, Any],
    answers: Sequence[Answer],
    compared: Sequence[Answer],
    *,
    name: str,
    training: Sequence[ChatRow] = (),
    pipeline: Pipeline | None = None,
) -> None:
    """Add to the scores of each dataset a ``comparison`` with another model.

    It has ``with``, the name of the other model, its ``scores``, and by metric the score of both, ``delta``,
    ``relative`` and the interval ``delta_95``; what is undefined is None.

    Args:
        scores: Of ``answers``, by dataset; they are added to.
        compared_scores: Of ``compared``, in the same form.
        answers: Of the model.
        compared: Of the other, to the same rows in the same order.
        name: What results call the other model.
        training: Rows trained on, by which generated queries are judged.
        pipeline: CTCVR is compared too.
    """
    datasets = defaultdict(list)
    for number, dataset in enumerate(dataset_names([answer.row for answer in answers])):
        datasets[dataset].append(number)
    for dataset, numbers in datasets.items():
        ours, others = ([of[number] for number in numbers] for of in (answers, compared))
        names = scores[dataset].get("ranking", {}).get("valid_names", LONGEST)
        metrics = deltas(ours, others, wanted=min(LONGEST, names))
        if task_named(ours[0].row.task).scoring is Scoring.queries:
            beside = rows_beside(ours, training)
            metrics |= _resampled(ours, query_values(ours, beside), query_values(others, beside))
        if pipeline and "ctcvr" in scores[dataset]:
            metrics["ctcvr"] = _mean_delta(ours, *(ctcvr_by_rows(of, pipeline) for of in (ours, others)))
        scores[dataset]["comparison"] = {"with": name, "metrics": metrics, "scores": compared_scores[dataset]}


def deltas(
    answers: Sequence[Answer], compared: Sequence[Answer], *, wanted: int = LONGEST
) -> dict[str, dict[str, Any]]:
    """Return by headline metric what two models reach on the same rows, of one task, and their difference.

    ``wanted`` is the length of a whole ranking.
    """
    if task_named(answers[0].row.task).scoring is Scoring.rankings:
        ours, others = (found_by_rows(of, wanted) for of in (answers, compared))
        return {name: _mean_delta(answers, ours[name], others[name]) for name in ours if name in others}
    return _resampled(answers, _headlines(answers), _headlines(compared))


def _resampled(answers: Sequence[Answer], score: Score, score_other: Score) -> dict[str, dict[str, Any]]:
    """Return the difference of what two models score, on all rows and on the same resamples of groups."""
    everything, groups = np.arange(len(answers)), [group_of(answer.row) for answer in answers]
    values, other_values = score(everything), score_other(everything)
    drawn: dict[str, list[float]] = defaultdict(list)
    for rows in resampled_rows(len(answers), groups=groups, resamples=_RESAMPLES):
        here, there = score(rows), score_other(rows)
        for name in values:
            own, other = here.get(name), there.get(name)
            if own is not None and other is not None:
                drawn[name].append(own - other)
    return {
        name: _delta(value, other_values.get(name), ends(percentile_interval(np.asarray(drawn[name]))))
        for name, value in values.items()
    }


def _headlines(answers: Sequence[Answer]) -> Score:
    """Return what computes the headline metrics of some of the answers, given their numbers; each is read once."""
    rows = [answer.row for answer in answers]
    task = task_named(rows[0].task)
    read = [read_answer(answer.row, answer.text) for answer in answers]

    def is_headline(name: str) -> bool:
        return name in (*task.headline, *_BESIDE_HEADLINES) or name.endswith("/balanced_accuracy")

    def score(numbers: NDArray[np.int64]) -> Values:
        drawn = numbers.tolist()
        found = task.metrics([rows[number] for number in drawn], [read[number] for number in drawn])
        return {name: value for name, value in found.items() if is_headline(name)}

    return score


def _mean_delta(answers: Sequence[Answer], values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Return the difference of two means over the same rows."""
    apart = [value - other for value, other in zip(values, others, strict=True)]
    interval = mean_interval(apart, groups=[group_of(answer.row) for answer in answers])
    return _delta(mean(values), mean(others), ends(interval))


def _delta(value: float | None, other: float | None, interval: list[float] | None) -> dict[str, Any]:
    delta = None if value is None or other is None else value - other
    return {
        "model": value,
        "compared": other,
        "delta": delta,
        "relative": None if delta is None or not other else delta / other,
        "delta_95": interval,
    }
