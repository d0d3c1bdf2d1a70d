"""An evaluation as one HTML page: scores beside baselines, confusion, calibration, and answers, wrong and right.

For that every answer is judged by itself: read or not, right or wrong, and how sure the model was of it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.dataset_tables import task_tables
from megatron_ads.evaluation.datasets import dataset_names
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
    """Share of the answer among the probabilities of its beams, or among samples; None with one answer alone."""


def judge(answers: Sequence[Answer]) -> list[JudgedAnswer]:
    """Return the outcome of each answer to a row of one task."""
    task = task_named(answers[0].row.task)
    outcomes = []
    for answer in answers:
        read = read_answer(answer.row, answer.text)
        failed = isinstance(read, StrEnum)
        label = answer.row.label if task.label_of else None
        given = task.label_of(read) if task.label_of and not failed else None
        outcomes.append(
            JudgedAnswer(
                answer=answer,
                given=given,
                failure=str(read) if failed else None,
                right=None if label is None else given is not None and same_name(given) == same_name(label),
                probability=_probability(answer),
            )
        )
    return outcomes


def _probability(answer: Answer) -> float | None:
    if not answer.beams:
        return None
    if answer.beams[0].samples is not None:
        return answer.beams[0].score
    log_probabilities = [beam.log_probability for beam in answer.beams]
    ratios = [math.exp(min(each - log_probabilities[0], MAX_EXPONENT)) for each in log_probabilities]
    return 1 / math.fsum(ratios) if len(ratios) > 1 else None


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
    """Return, for every outcome, its name, how often it occurs and the first ``most`` answers.

    Ways to fail come first, frequent ones before others; what did not fail comes last.
    """
    kinds: dict[tuple[bool, str], list[JudgedAnswer]] = {}
    for one in outcomes:
        if one.failure is not None:
            kind = f"{NOT_READ}: {one.failure}"
        else:
            kind = {False: "read, and wrong", True: "right", None: "read"}[one.right]
        kinds.setdefault((one.failure is None and one.right is not False, kind), []).append(one)
    ordered = sorted(kinds.items(), key=lambda kind: (kind[0][0], -len(kind[1])))
    return [(kind, len(of_kind), of_kind[:most]) for (_, kind), of_kind in ordered]


def evaluation_page(scores: Mapping[str, Any], answers: Sequence[Answer], *, title: str, about: str) -> str:
    """Return the page of ``scores``, which `megatron-ads evaluate --json` prints; ``about`` is a sentence on how."""
    datasets: dict[str, list[Answer]] = defaultdict(list)
    for answer, name in zip(answers, dataset_names([answer.row for answer in answers]), strict=True):
        datasets[name].append(answer)
    tasks = [
        {
            "name": task,
            "tables": tables,
            "datasets": [
                _dataset_parts(name, judge(datasets[name]))
                for name, of_dataset in scores["tasks"].items()
                if of_dataset["task"] == task
            ],
        }
        for task, tables in task_tables(scores["tasks"]).items()
    ]
    return render("evaluation/evaluation.html.jinja", title=title, about=about, scores=scores, tasks=tasks)


def _dataset_parts(name: str, outcomes: Sequence[JudgedAnswer]) -> dict[str, Any]:
    """Return what the template shows of the answers to one dataset; what there is nothing to show of is None."""
    truths, given, pairs = confusion(outcomes)
    matrix = None
    if truths and max(len(truths), len(given)) <= _MOST_LABELS:
        rows = []
        for truth in truths:
            counts = [pairs[truth, label] for label in given]
            shares = [count / sum(counts) for count in counts]
            rows.append((truth, list(zip(counts, shares, [label == truth for label in given], strict=True))))
        matrix = {"given": given, "rows": rows}
    sure = [one for one in outcomes if one.probability is not None and one.right is not None]
    return {
        "name": name,
        "confusion": matrix,
        "calibration": _calibration(sure) if sure else None,
        "answers": [
            (f"{kind}: {count} of {len(outcomes)}", [_shown(one.answer) for one in chosen])
            for kind, count, chosen in samples(outcomes, _MOST_SAMPLES)
        ],
    }


def _shown(answer: Answer) -> dict[str, Any]:
    row = answer.row
    beams = [
        {
            "text": _shortened(beam.text),
            "about": f"log-probability {beam.log_probability:.2f}, "
            + (f"{beam.samples} samples" if beam.samples else f"score {beam.score:.2f}"),
        }
        for beam in answer.beams
    ]
    texts = map(_shortened, (row.prompt[-1].content, row.label or row.target, answer.text))
    return dict(zip(("prompt", "true", "answer"), texts, strict=True)) | {"id": row.id, "beams": beams}


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} …"


def _calibration(sure: Sequence[JudgedAnswer]) -> Chart:
    truths = [bool(one.right) for one in sure]
    probabilities = [one.probability or 0.0 for one in sure]
    points = [(one.mean_probability, one.share_of_positives) for one in calibration_bins(truths, probabilities)]
    svg = line_chart(
        [
            Series(name="right as often as sure", points=[(0.0, 0.0), (1.0, 1.0)], style="faint", color=2),
            Series(name="answers", points=points, style="dots"),
        ],
        x_label="share of the first answer among the probabilities of all beams, or samples",
        y_label="share that is right",
        y_limits=(0.0, 1.0),
    )
    error = calibration_error(truths, probabilities)
    return Chart(svg, f"{len(sure)} answers; expected calibration error {fixed(error)}.")
