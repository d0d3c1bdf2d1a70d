"""An evaluation as one HTML page: scores beside baselines, confusion, calibration, and answers that failed, by kind.

For that every answer is judged by itself: read or not, right or wrong, and how sure the model was of it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any

from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.score_tables import score_tables
from megatron_ads.metrics.classification import calibration_bins, calibration_error
from megatron_ads.metrics.ranking import same_name
from megatron_ads.metrics.text import MAX_EXPONENT
from megatron_ads.reporting.chart import Chart, Series, line_chart
from megatron_ads.reporting.page import fixed, render
from megatron_ads.tasks.registry import read_answer, task_named

NOT_READ = "not read"
_MOST_LABELS = 12
"""A larger confusion matrix is not shown."""
_MOST_SAMPLES = 3
_MOST_CHARACTERS = 1500


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedAnswer:
    """One answer, judged by itself."""

    answer: Answer
    given: str | None
    """The label that was read; None: nothing could be read, or the task has no labels."""
    failure: str | None
    """Why nothing could be read; None: it could."""
    right: bool | None
    """None: the task has no labels."""
    probability: float | None
    """Share of the answer among the probabilities of its beams; None without beams."""


def judge(answers: Sequence[Answer]) -> list[JudgedAnswer]:
    """Return the outcome of each answer to a row of one task."""
    task = task_named(answers[0].row.task)
    outcomes = []
    for answer in answers:
        read = read_answer(answer.row, answer.text)
        failed = isinstance(read, StrEnum)
        label = answer.row.label if task.label_of else None
        given = task.label_of(read) if task.label_of and not failed else None
        log_probabilities = [beam.log_probability for beam in answer.beams]
        ratios = [math.exp(min(each - log_probabilities[0], MAX_EXPONENT)) for each in log_probabilities]
        outcomes.append(
            JudgedAnswer(
                answer=answer,
                given=given,
                failure=str(read) if failed else None,
                right=None if label is None else given is not None and same_name(given) == same_name(label),
                probability=1 / math.fsum(ratios) if len(ratios) > 1 else None,
            )
        )
    return outcomes


def confusion(outcomes: Sequence[JudgedAnswer]) -> tuple[list[str], list[str], Counter[tuple[str, str]]]:
    """Return the true labels, the given labels and how often each pair occurs; what was not read is a label too."""
    judged = [(one.answer.row.label or "", one.given) for one in outcomes if one.right is not None]
    as_spelt: dict[str, str] = {}
    for label in [*(truth for truth, _ in judged), *(given for _, given in judged if given is not None)]:
        as_spelt.setdefault(same_name(label), label)
    pairs = Counter(
        (as_spelt[same_name(truth)], NOT_READ if given is None else as_spelt[same_name(given)])
        for truth, given in judged
    )
    truths = sorted({truth for truth, _ in pairs})
    others = sorted({given for _, given in pairs} - {*truths, NOT_READ})
    unread = [NOT_READ] if any(given == NOT_READ for _, given in pairs) else []
    return truths, [*truths, *others, *unread], pairs


def samples(outcomes: Sequence[JudgedAnswer], most: int) -> list[tuple[str, int, list[JudgedAnswer]]]:
    """Return, for every way to fail, its name, how often it occurs and the first ``most``; frequent ones first."""
    kinds: dict[str, list[JudgedAnswer]] = {}
    for one in outcomes:
        if one.failure is not None:
            kinds.setdefault(f"{NOT_READ}: {one.failure}", []).append(one)
        elif one.right is False:
            kinds.setdefault("read, and wrong", []).append(one)
    frequent = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    return [(kind, len(of_kind), of_kind[:most]) for kind, of_kind in frequent]


def evaluation_page(scores: Mapping[str, Any], answers: Sequence[Answer], *, title: str, about: str) -> str:
    """Return the page of ``scores``, which `megatron-ads evaluate --json` prints; ``about`` is a sentence on how."""
    by_task = groupby(sorted(answers, key=lambda answer: answer.row.task), key=lambda answer: answer.row.task)
    tasks = [_task_parts(task, scores["tasks"][task], judge(list(of_task))) for task, of_task in by_task]
    return render("evaluation/evaluation.html.jinja", title=title, about=about, scores=scores, tasks=tasks)


def _task_parts(task: str, scores: Mapping[str, Any], outcomes: Sequence[JudgedAnswer]) -> dict[str, Any]:
    """Return what the template shows of one task; what there is nothing to show of is None or empty."""
    truths, given, pairs = confusion(outcomes)
    matrix = None
    if truths and max(len(truths), len(given)) <= _MOST_LABELS:
        cells = [(truth, *(pairs[truth, label] for label in given)) for truth in truths]
        matrix = {"head": ["true", *given], "rows": cells}
    sure = [one for one in outcomes if one.probability is not None and one.right is not None]

    def shown(answer: Answer) -> list[str]:
        row = answer.row
        texts = (row.prompt[-1].content, row.label or row.target, answer.text)
        return [row.id, *(text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} …" for text in texts)]

    return {
        "name": task,
        "tables": score_tables(task, scores),
        "confusion": matrix,
        "calibration": _calibration(sure) if sure else None,
        "failed": [
            (f"{kind}: {count} of {len(outcomes)}", [shown(one.answer) for one in chosen])
            for kind, count, chosen in samples(outcomes, _MOST_SAMPLES)
        ],
    }


def _calibration(sure: Sequence[JudgedAnswer]) -> Chart:
    truths = [bool(one.right) for one in sure]
    probabilities = [one.probability or 0.0 for one in sure]
    points = [(one.mean_probability, one.share_of_positives) for one in calibration_bins(truths, probabilities)]
    svg = line_chart(
        [
            Series(name="right as often as sure", points=[(0.0, 0.0), (1.0, 1.0)], style="faint", color=2),
            Series(name="answers", points=points, style="dots"),
        ],
        x_label="share of the first answer among the probabilities of all beams",
        y_label="share that is right",
        y_limits=(0.0, 1.0),
    )
    error = calibration_error(truths, probabilities)
    return Chart(svg, f"{len(sure)} answers; expected calibration error {fixed(error)}.")
