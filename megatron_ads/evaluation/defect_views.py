"""One line of the papers' binary tables for the model, and one for everything it should be compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ads.data.rows import ChatRow, Fact
from megatron_ads.evaluation.text_baseline import text_predictions
from megatron_ads.metrics.classification import (
    DefectView,
    balanced_accuracy_interval,
    binary_metrics,
    majority_predictions,
)

Labels = Sequence[str | None]
"""What was given for each row; None could not be read."""


def defect_view(
    view: DefectView, truths: Sequence[str], lines: Mapping[str, Labels], groups: Sequence[str]
) -> dict[str, Any]:
    """Return the metrics of each line in one view as JSON values, and a bootstrap interval over groups of the model's.

    Args:
        view: Which labels are a defect.
        truths: The true label of each row.
        lines: ``model`` and others.
        groups: Rows of equal value, such as of one query, are not independent.
    """
    interval = balanced_accuracy_interval(truths, lines["model"], view, groups=groups)
    return {
        **{name: binary_metrics(truths, labels, view).as_dict() for name, labels in lines.items()},
        "balanced_accuracy_95": None if interval is None else [interval.low, interval.high],
    }


def lines_beside(
    model: Labels,
    rows: Sequence[ChatRow],
    training: Sequence[ChatRow],
    *,
    best: Labels | None = None,
) -> dict[str, Labels]:
    """Return the model's labels and those it is compared with, by name.

    ``baseline`` always gives the most frequent label of the training rows. ``text_baseline`` is there where these have
    two labels or more, ``reachable`` where the best answers are known.

    Args:
        model: Labels that the model gave.
        rows: With their true labels.
        training: Rows of the same task, trained on.
        best: The best answer to each row; None: not known of every one.
    """
    truths = [row.label or "" for row in rows]
    lines: dict[str, Labels] = {
        "model": model,
        "baseline": majority_predictions(truths, learned_from=[row.label for row in training if row.label is not None]),
    }
    if from_words := text_predictions(training, rows):
        lines["text_baseline"] = from_words
    if best is not None:
        lines["reachable"] = best
    return lines


def best_answers(rows: Sequence[ChatRow]) -> list[tuple[str, ...]] | None:
    """Return the best answers to each row, the likeliest first; None unless all rows have them."""
    if not all(Fact.best_answers in row.facts for row in rows):
        return None
    return [row.list_fact(Fact.best_answers) for row in rows]


def best_labels(rows: Sequence[ChatRow]) -> list[str] | None:
    """Return the best label of each row; None unless all rows have one."""
    best = best_answers(rows)
    return None if best is None else [answers[0] for answers in best]
