"""From answers to numbers: the relevance metric beside its baselines, and why answers could not be read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError
from megatron_ads.evaluation.answer import Answer
from megatron_ads.evaluation.defect_views import best_labels, defect_view, lines_beside
from megatron_ads.metrics.classification import DefectView
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.ground_truth import ground_truth
from megatron_ads.tasks.relevance import (
    BAD_VIEW,
    FAIR_VIEW,
    LOCATION_VIEW,
    QUALITY_VIEW,
    TASK,
    Label,
    RelevanceJudgement,
    parse,
)


def relevance_scores(
    answers: Sequence[Answer],
    *,
    training: Sequence[ChatRow],
    reasons: bool = True,
) -> dict[str, Any]:
    """Return the scores of ``answers`` as JSON values; what is undefined is None.

    ``views`` holds one entry per way to call a label bad (AdNanny, tables 1 to 4), with the lines of
    ``evaluation.defect_views``; those of place and quality are there if any row asks for them, and are over such rows.
    An answer that cannot be read counts as wrong.

    Args:
        answers: To rows of this task.
        training: Rows of this task that baselines learn from.
        reasons: Answers must have reasoning.

    Raises:
        DataError: If a row is of another task, or has no label.
    """
    truths = [_true_label(answer.row) for answer in answers]
    outcomes = [parse(answer.text, reasoning_required=reasons) for answer in answers]
    given = [outcome if isinstance(outcome, RelevanceJudgement) else None for outcome in outcomes]
    predictions = [None if outcome is None else str(outcome.label) for outcome in given]
    rows = [answer.row for answer in answers]
    queries = [row.group or row.id for row in rows]
    lines = lines_beside(predictions, rows, training, best=best_labels(rows))
    failures = Counter(str(outcome) for outcome in outcomes if isinstance(outcome, ReadFailure))
    return {
        "rows": len(answers),
        "queries": len(set(queries)),
        "accuracy": _share([truth == guess for truth, guess in zip(truths, predictions, strict=True)]),
        "baseline_accuracy": _share([truth == guess for truth, guess in zip(truths, lines["baseline"], strict=True)]),
        "baseline_label": lines["baseline"][0],
        "readable_share": _share([guess is not None for guess in predictions]),
        "ended_share": _share([answer.ended for answer in answers]),
        "unreadable_because": dict(failures.most_common()),
        "label_counts": dict(Counter(truths)),
        "views": {
            **{view.name: defect_view(view, truths, lines, queries) for view in (BAD_VIEW, FAIR_VIEW)},
            **_flag_view(LOCATION_VIEW, "location", rows, given, training),
            **_flag_view(QUALITY_VIEW, "quality", rows, given, training),
        },
    }


def _flag_view(
    view: DefectView,
    flag: str,
    rows: Sequence[ChatRow],
    given: Sequence[RelevanceJudgement | None],
    training: Sequence[ChatRow],
) -> dict[str, Any]:
    """Return the view of a flag under its name; nothing if no row asks for it."""
    asked = [(row, found) for row, found in zip(_labelled(rows, flag), given, strict=True) if row.label is not None]
    if not asked:
        return {}
    flagged = [row for row, _ in asked]
    model = [None if found is None else getattr(found, flag) for _, found in asked]
    lines = lines_beside(model, flagged, _labelled(training, flag))
    queries = [row.group or row.id for row in flagged]
    return {view.name: defect_view(view, [row.label or "" for row in flagged], lines, queries)}


def _labelled(rows: Sequence[ChatRow], flag: str) -> list[ChatRow]:
    """Return rows whose label is a flag of their target; None where it has none."""
    flags = [getattr(ground_truth(row, RelevanceJudgement), flag) for row in rows]
    return [replace(row, label=None if value is None else str(value)) for row, value in zip(rows, flags, strict=True)]


def _true_label(row: ChatRow) -> str:
    if row.task != TASK or row.label not in set(Label):
        raise DataError(
            f"row {row.id!r} is of task {row.task!r} with label {row.label!r}; {TASK} rows are labelled "
            f"{', '.join(Label)}."
        )
    return str(row.label)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
