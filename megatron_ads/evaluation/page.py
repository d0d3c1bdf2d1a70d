"""An evaluation as one HTML page: scores beside baselines, confusion, calibration, and answers that failed, by kind."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.outcomes import Outcome, confusion, judge, samples
from megatron_ads.evaluation.score_tables import RELEVANCE, paper_tables, plain_metrics, shown
from megatron_ads.metrics.classification import calibration_bins, calibration_error
from megatron_ads.reporting.chart import Series, line_chart
from megatron_ads.reporting.page import Chart, Figure, Section, Table, render_page

_MOST_LABELS = 12
"""A larger confusion matrix is not shown."""
_MOST_SAMPLES = 3
_MOST_CHARACTERS = 1500


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


def _task_sections(task: str, scores: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[Section]:
    blocks: list[str | Table | Chart] = [_label_table(scores) if task == RELEVANCE else _metrics_table(scores)]
    for paper in paper_tables(task, scores):
        numbers = frozenset(range(1, len(paper.head)))
        blocks += [paper.title, Table(head=paper.head, rows=paper.rows, numbers=numbers)]
        blocks += [paper.note] if paper.note else []
    if "ranking" in scores:
        blocks += _ranking_blocks(scores["ranking"])
    sections = [Section(title=task, blocks=blocks)]
    truths, given, pairs = confusion(outcomes)
    if truths and max(len(truths), len(given)) <= _MOST_LABELS:
        rows = [[truth, *(f"{pairs[truth, label]}" for label in given)] for truth in truths]
        numbers = frozenset(range(1, len(given) + 1))
        explained = "Rows are the true labels, columns what the model answered, cells numbers of answers."
        table = Table(head=["true", *given], rows=rows, numbers=numbers)
        sections.append(Section(title=f"{task}: confusion", blocks=[explained, table]))
    if sure := [one for one in outcomes if one.probability is not None and one.right is not None]:
        sections.append(Section(title=f"{task}: calibration", blocks=_calibration_blocks(sure)))
    if failed := samples(outcomes, _MOST_SAMPLES):
        sections.append(Section(title=f"{task}: answers that failed", blocks=_sample_blocks(failed, len(outcomes))))
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


def _calibration_blocks(sure: Sequence[Outcome]) -> list[str | Chart]:
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


def _sample_blocks(failed: Sequence[tuple[str, int, Sequence[Outcome]]], total: int) -> list[str | Table]:
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
