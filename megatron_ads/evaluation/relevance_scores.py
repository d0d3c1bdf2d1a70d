"""From answers to numbers: the relevance metric next to its majority baseline, and why answers could not be read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError
from megatron_ads.evaluation.answer import Answer
from megatron_ads.evaluation.text_baseline import text_predictions
from megatron_ads.metrics.classification import (
    DefectView,
    balanced_accuracy_interval,
    binary_metrics,
    majority_predictions,
)
from megatron_ads.tasks.relevance import BAD_VIEW, FAIR_VIEW, TASK, Failure, Label, parse


def relevance_scores(
    answers: Sequence[Answer], *, training: Sequence[ChatRow], best: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """Return the scores of ``answers`` as JSON values; what is undefined is None.

    ``views`` holds one entry per way to call a label bad (AdNanny, tables 1 to 4): the model's line, the line of the
    baseline that always answers the most frequent label of the training rows, and a bootstrap interval of the balanced
    accuracy over queries. An answer that cannot be read counts as wrong. Where the training rows have two labels or
    more, there is a line ``text_baseline`` (``evaluation.text_baseline``), and where ``best`` holds the best answers to
    every row, by its id, a line ``reachable``.

    Raises:
        DataError: If a row is of another task, or has no label.
    """
    truths = [_true_label(answer.row) for answer in answers]
    outcomes = [parse(answer.text) for answer in answers]
    predictions = [None if isinstance(outcome, Failure) else str(outcome.label) for outcome in outcomes]
    rows = [answer.row for answer in answers]
    baseline = majority_predictions(truths, learned_from=[row.label for row in training if row.label is not None])
    from_words = text_predictions(training, rows)
    queries = [row.group for row in rows]
    known = [best[row.id][0] for row in rows if best and row.id in best]
    more = {"text_baseline": from_words, "reachable": known if len(known) == len(rows) else None}
    failures = Counter(str(outcome) for outcome in outcomes if isinstance(outcome, Failure))
    return {
        "rows": len(answers),
        "queries": len(set(queries)),
        "accuracy": _share([truth == guess for truth, guess in zip(truths, predictions, strict=True)]),
        "baseline_accuracy": _share([truth == guess for truth, guess in zip(truths, baseline, strict=True)]),
        "baseline_label": baseline[0],
        "readable_share": _share([guess is not None for guess in predictions]),
        "ended_share": _share([answer.ended for answer in answers]),
        "unreadable_because": dict(failures.most_common()),
        "label_counts": dict(Counter(truths)),
        "views": {
            view.name: _in_view(view, truths, predictions, baseline, queries)
            | {line: binary_metrics(truths, labels, view).as_dict() for line, labels in more.items() if labels}
            for view in (BAD_VIEW, FAIR_VIEW)
        },
    }


def _true_label(row: ChatRow) -> str:
    if row.task != TASK or row.label not in set(Label):
        raise DataError(
            f"row {row.id!r} is of task {row.task!r} with label {row.label!r}; {TASK} rows are labelled "
            f"{', '.join(Label)}."
        )
    return str(row.label)


def _in_view(
    view: DefectView,
    truths: Sequence[str],
    predictions: Sequence[str | None],
    baseline: Sequence[str | None],
    queries: Sequence[str],
) -> dict[str, Any]:
    interval = balanced_accuracy_interval(truths, predictions, view, groups=queries)
    return {
        "model": binary_metrics(truths, predictions, view).as_dict(),
        "baseline": binary_metrics(truths, baseline, view).as_dict(),
        "balanced_accuracy_95": None if interval is None else [interval.low, interval.high],
    }


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
