"""Scores of tasks with labels: the papers' binary views of the model beside everything it should be compared with.

The text baseline is TF-IDF of the words and pairs of words of a prompt, logistic regression with balanced classes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_ads.data.split import group_of
from megatron_ads.errors import DataError
from megatron_ads.evaluation.answer_records import Answer, ended_share
from megatron_ads.metrics.classification import (
    DefectView,
    balanced_accuracy_interval,
    binary_metrics,
    majority_predictions,
)
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks import ad_user_relevance
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.ground_truth import ground_truth, readable
from megatron_ads.tasks.registry import read_answer
from megatron_ads.tasks.relevance import (
    BAD_VIEW,
    FAIR_VIEW,
    LOCATION_VIEW,
    QUALITY_VIEW,
    TASK,
    Label,
    RelevanceJudgement,
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
        **{name: binary_metrics(truths, labels, view) for name, labels in lines.items()},
        "balanced_accuracy_95": None if interval is None else [interval.low, interval.high],
    }


def lines_beside(
    model: Labels, rows: Sequence[ChatRow], training: Sequence[ChatRow], *, reachable: bool = True
) -> dict[str, Labels]:
    """Return the model's labels and those it is compared with, by name.

    ``baseline`` always gives the most frequent label of the training rows. ``text_baseline`` exists where these have
    two labels or more, ``reachable`` where the best answers are known.

    Args:
        model: Labels that the model gave.
        rows: With their true labels.
        training: Rows of the same task, trained on.
        reachable: Also compare with the best answers, where every row has them.
    """
    truths = [row.label or "" for row in rows]
    lines: dict[str, Labels] = {
        "model": model,
        "baseline": majority_predictions(truths, learned_from=[row.label for row in training if row.label is not None]),
    }
    if from_words := text_predictions(training, rows):
        lines["text_baseline"] = from_words
    if reachable and (best := best_answers(rows)):
        lines["reachable"] = [answers[0] for answers in best]
    return lines


def best_answers(rows: Sequence[ChatRow]) -> list[tuple[str, ...]] | None:
    """Return the best answers to each row, the likeliest first; None unless all rows have them."""
    if not all(Fact.best_answers in row.facts for row in rows):
        return None
    return [row.list_fact(Fact.best_answers) for row in rows]


def text_predictions(training: Sequence[ChatRow], rows: Sequence[ChatRow]) -> list[str] | None:
    """Return a label for each of ``rows``, learned from the labels of ``training``; None if they have fewer than two.

    Rows without a label are not learned from.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    labelled = [row for row in training if row.label is not None]
    if len({row.label for row in labelled}) < 2:
        return None
    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(class_weight="balanced", max_iter=1000),
    )

    def texts(of: Sequence[ChatRow]) -> list[str]:
        return ["\n".join(message.content for message in row.prompt) for row in of]

    classifier.fit(texts(labelled), [row.label for row in labelled])
    return [str(label) for label in classifier.predict(texts(rows))]


def relevance_scores(answers: Sequence[Answer], *, training: Sequence[ChatRow]) -> dict[str, Any]:
    """Return the scores of ``answers`` as JSON values; what is undefined is None.

    ``views`` holds one entry per way to call a label bad (AdNanny, tables 1 to 4), with the lines of
    ``lines_beside``; those of place and quality are there if any row asks for them, and are over such rows.
    An answer that cannot be read counts as wrong.

    Args:
        answers: To rows of this task.
        training: Rows of this task that baselines learn from.

    Raises:
        DataError: If a row is of another task, or has no label.
    """
    rows = [answer.row for answer in answers]
    truths = list(map(_label_of, rows))
    outcomes = [read_answer(answer.row, answer.text) for answer in answers]
    given = [readable(outcome) for outcome in outcomes]
    predictions = [None if outcome is None else str(outcome.label) for outcome in given]
    queries = [group_of(row) for row in rows]
    lines = lines_beside(predictions, rows, training)
    failures = Counter(str(outcome) for outcome in outcomes if isinstance(outcome, ReadFailure))
    return {
        "rows": len(answers),
        "queries": len(set(queries)),
        "accuracy": _share([truth == guess for truth, guess in zip(truths, predictions, strict=True)]),
        "baseline_accuracy": _share([truth == guess for truth, guess in zip(truths, lines["baseline"], strict=True)]),
        "baseline_label": lines["baseline"][0],
        "readable_share": _share([guess is not None for guess in predictions]),
        "ended_share": ended_share(answers),
        "unreadable_because": dict(failures.most_common()),
        "label_counts": dict(Counter(truths)),
        "views": {
            **{view.name: defect_view(view, truths, lines, queries) for view in (BAD_VIEW, FAIR_VIEW)},
            **_flag_view(LOCATION_VIEW, "location", rows, given, training),
            **_flag_view(QUALITY_VIEW, "quality", rows, given, training),
        },
    }


def _label_of(row: ChatRow) -> str:
    if row.task != TASK or row.label not in set(Label):
        raise DataError(
            f"row {row.id!r} is of task {row.task!r} with label {row.label!r}; {TASK} rows are labelled "
            f"{', '.join(Label)}."
        )
    return str(row.label)


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
    lines = lines_beside(model, flagged, _labelled(training, flag), reachable=False)
    queries = [group_of(row) for row in flagged]
    return {view.name: defect_view(view, [row.label or "" for row in flagged], lines, queries)}


def _labelled(rows: Sequence[ChatRow], flag: str) -> list[ChatRow]:
    """Return rows whose label is a flag of their target; None where it has none."""
    flags = [getattr(ground_truth(row, RelevanceJudgement), flag) for row in rows]
    return [replace(row, label=None if value is None else str(value)) for row, value in zip(rows, flags, strict=True)]


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def score_views(answers: Sequence[Answer], *, training: Sequence[ChatRow]) -> dict[str, Any]:
    """Return the bad view, with the lines of ``lines_beside`` and the AUC of each, as JSON values."""
    rows = [answer.row for answer in answers]
    truths = [str(ground_truth(row, ad_user_relevance.UserRelevanceJudgement).score) for row in rows]
    given = [readable(read_answer(answer.row, answer.text)) for answer in answers]
    lines = lines_beside([str(found.score) if found else None for found in given], rows, training)
    view = defect_view(ad_user_relevance.BAD_VIEW, truths, lines, [group_of(row) for row in rows])
    for name, labels in lines.items():
        view[name]["auc"] = ad_user_relevance.match_auc(truths, labels)
    return {ad_user_relevance.BAD_VIEW.name: view}
