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
from megatron_ads.evaluation.score_tables import RELEVANCE, paper_tables, plain_metrics, shown
from megatron_ads.metrics.classification import calibration_bins, calibration_error
from megatron_ads.metrics.ranking import same_name
from megatron_ads.metrics.text import MAX_EXPONENT
from megatron_ads.reporting.chart import Series, line_chart
from megatron_ads.reporting.page import Chart, Figure, PageSection, Table, render_page
from megatron_ads.tasks.registry import task_named

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


def judge(answers: Sequence[Answer], *, reasons: bool = True) -> list[JudgedAnswer]:
    """Return the outcome of each answer to a row of one task; without ``reasons`` none needs reasoning."""
    task = task_named(answers[0].row.task)
    outcomes = []
    for answer in answers:
        read = task.parse(answer.text, reasoning_required=task.reasons and reasons)
        failed = isinstance(read, StrEnum)
        label = answer.row.label if task.label_of else None
        given = task.label_of(read) if task.label_of and not failed else None
        outcomes.append(
            JudgedAnswer(
                answer=answer,
                given=given,
                failure=str(read) if failed else None,
                right=None if label is None else given is not None and same_name(given) == same_name(label),
                probability=_share_of_best(answer),
            )
        )
    return outcomes


def confusion(outcomes: Sequence[JudgedAnswer]) -> tuple[list[str], list[str], Counter[tuple[str, str]]]:
    """Return the true labels, the given labels and how often each pair occurs; what was not read is a label too."""
    pairs = Counter(
        (one.answer.row.label or "", one.given if one.given is not None else NOT_READ)
        for one in outcomes
        if one.right is not None
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
    return [
        (kind, len(of_kind), of_kind[:most]) for kind, of_kind in sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    ]


def _share_of_best(answer: Answer) -> float | None:
    if len(answer.beams) < 2:
        return None
    best = answer.beams[0].log_probability
    return 1 / math.fsum(math.exp(min(beam.log_probability - best, MAX_EXPONENT)) for beam in answer.beams)


def evaluation_page(scores: Mapping[str, Any], answers: Sequence[Answer], *, title: str, about: str) -> str:
    """Return the page.

    Args:
        scores: What `megatron-ads evaluate --json` prints.
        answers: What they were made from.
        title: What was evaluated.
        about: One sentence on how.
    """
    by_task = groupby(sorted(answers, key=lambda answer: answer.row.task), key=lambda answer: answer.row.task)
    sections = [
        section
        for task, of_task in by_task
        for section in _task_sections(task, scores["tasks"][task], judge(list(of_task), reasons=scores["reasoning"]))
    ]
    figures = [_figure(task, of_task) for task, of_task in scores["tasks"].items()]
    figures += [
        Figure(label=domain, value=shown(of_domain["perplexity"]), note=f"perplexity, {of_domain['rows']} rows")
        for domain, of_domain in scores["general"].items()
    ]
    return render_page(title, about, figures, sections)


def _figure(task: str, scores: Mapping[str, Any]) -> Figure:
    if task == RELEVANCE:
        view = scores["views"]["bad"]
        note = f"balanced accuracy, defect: bad; always {scores['baseline_label']}: " + shown(
            view["baseline"]["balanced_accuracy"]
        )
        return Figure(label=task, value=shown(view["model"]["balanced_accuracy"]), note=note)
    value = shown(scores["headline"])
    return Figure(label=task, value=value, note=str(scores["headline_name"] or "undefined"))


def _task_sections(task: str, scores: Mapping[str, Any], outcomes: Sequence[JudgedAnswer]) -> list[PageSection]:
    blocks: list[str | Table | Chart] = [_label_table(scores) if task == RELEVANCE else _metrics_table(scores)]
    for paper in paper_tables(task, scores):
        numbers = frozenset(range(1, len(paper.head)))
        blocks += [paper.title, Table(head=paper.head, rows=paper.rows, numbers=numbers)]
        blocks += [paper.note] if paper.note else []
    if "ranking" in scores:
        blocks += _ranking_blocks(scores["ranking"])
    sections = [PageSection(title=task, blocks=blocks)]
    truths, given, pairs = confusion(outcomes)
    if truths and max(len(truths), len(given)) <= _MOST_LABELS:
        rows = [[truth, *(f"{pairs[truth, label]}" for label in given)] for truth in truths]
        numbers = frozenset(range(1, len(given) + 1))
        explained = "Rows are the true labels, columns what the model answered, cells numbers of answers."
        table = Table(head=["true", *given], rows=rows, numbers=numbers)
        sections.append(PageSection(title=f"{task}: confusion", blocks=[explained, table]))
    if sure := [one for one in outcomes if one.probability is not None and one.right is not None]:
        sections.append(PageSection(title=f"{task}: calibration", blocks=_calibration_blocks(sure)))
    if failed := samples(outcomes, _MOST_SAMPLES):
        sections.append(PageSection(title=f"{task}: answers that failed", blocks=_sample_blocks(failed, len(outcomes))))
    return sections


def _label_table(scores: Mapping[str, Any]) -> Table:
    rows = [
        ["accuracy over all labels", shown(scores["accuracy"])],
        [f"accuracy of always {scores['baseline_label']}", shown(scores["baseline_accuracy"])],
        ["answers that could be read", shown(scores["readable_share"])],
        ["answers that the model ended", shown(scores["ended_share"])],
    ]
    return Table(rows=rows, numbers=frozenset({1}))


def _metrics_table(scores: Mapping[str, Any]) -> Table:
    values = {
        **plain_metrics(scores),
        "answers that could be read": scores["readable_share"],
        "answers that the model ended": scores["ended_share"],
    }
    rows = [
        [name, shown(value), _range(scores["headline_95"]) if name == scores["headline_name"] else ""]
        for name, value in values.items()
    ]
    return Table(head=["", "model", "95 % of resampled groups"], rows=rows, numbers=frozenset({1, 2}))


def _ranking_blocks(ranking: Mapping[str, Any]) -> list[str | Table]:
    columns = dict.fromkeys(name for of_method in ranking["methods"].values() for name in of_method)
    names = [name for name in columns if not name.endswith("_95")]
    rows = [
        [method, *(f"{shown(values.get(name))} {_range(values.get(f'{name}_95'))}".strip() for name in names)]
        for method, values in ranking["methods"].items()
    ]
    explained = (
        f"Rankings, with 95 % of resampled users in brackets. There are {ranking['valid_names']} valid names, from "
        f"{ranking['names_from']}; the true one is among them in {ranking['truth_is_valid']:.1%} of the rows."
    )
    return [explained, Table(head=["method", *names], rows=rows, numbers=frozenset(range(1, len(names) + 1)))]


def _calibration_blocks(sure: Sequence[JudgedAnswer]) -> list[str | Chart]:
    truths = [bool(one.right) for one in sure]
    probabilities = [one.probability or 0.0 for one in sure]
    bins = calibration_bins(truths, probabilities)
    points = [(one.mean_probability, one.share_of_positives) for one in bins]
    chart = line_chart(
        [
            Series(name="right as often as sure", points=[(0.0, 0.0), (1.0, 1.0)], style="faint", color=2),
            Series(name="answers", points=points, style="dots"),
        ],
        x_label="share of the first answer among the probabilities of all beams",
        y_label="share that is right",
        y_from_zero=True,
    )
    error = calibration_error(truths, probabilities)
    return [Chart(svg=chart, caption=f"{len(sure)} answers; expected calibration error {shown(error)}.")]


def _sample_blocks(failed: Sequence[tuple[str, int, Sequence[JudgedAnswer]]], total: int) -> list[str | Table]:
    blocks: list[str | Table] = []
    for kind, count, chosen in failed:
        rows = [
            [
                one.answer.row.id,
                _cut(one.answer.row.prompt[-1].content),
                one.answer.row.label or _cut(one.answer.row.target),
                _cut(one.answer.text),
            ]
            for one in chosen
        ]
        blocks += [f"{kind}: {count} of {total}", Table(head=["row", "prompt", "true", "answer"], rows=rows)]
    return blocks


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} …"


def _range(interval: Sequence[float] | None) -> str:
    return f"({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
