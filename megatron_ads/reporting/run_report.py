"""The report of one training run: its curves and circumstances, from what the run wrote, as one HTML page."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.config.recipe_errors import current_settings
from megatron_ads.errors import MegatronAdsError
from megatron_ads.observability.log import get_logger
from megatron_ads.observability.metrics import read_metrics
from megatron_ads.reporting.chart import COLORS, Series, line_chart, short, smooth
from megatron_ads.reporting.page import Chart, Figure, PageSection, Table, render_page

logger = get_logger(__name__)

REPORT_FILE = "report.html"
RUN_FILE = "run.json"

_SMALL = (360, 190)
_SHARES = (
    "Share of each task in the samples drawn from the evaluation on: in proportion to (1 - metric) ^ reweight.alpha. A "
    "task that stagnates gains share, one that is learned loses it."
)
_WEIGHTS = (
    "Weights of a task's training samples, at each renewal: the median, and what a tenth stay below and above. Below 1 "
    "the perplexity fell since the renewal before; at 1 it stayed; above 1 it rose."
)

Metrics = Sequence[Mapping[str, Any]]


def write_run_report(folder: Path) -> None:
    """Write the page next to what the run wrote; a page that cannot be made is a warning, not the end of the run."""
    try:
        write_small(folder / REPORT_FILE, run_page(folder))
    except (MegatronAdsError, OSError) as error:
        logger.warning("%s could not be written: %s", folder / REPORT_FILE, error)


def run_page(folder: Path) -> str:
    """Return the page of the run whose ``run.json`` and ``metrics.jsonl`` are in ``folder``.

    Raises:
        ConfigError: If no run has written metrics there.
    """
    metrics = read_metrics(folder)
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    sections = [
        PageSection(title="Loss", blocks=[loss_chart(metrics)]),
        *_tasks(metrics),
        PageSection(title="Course", blocks=[course_charts(metrics)]),
        PageSection(title="Circumstances", blocks=[Table(rows=[*_leaves(run)])]),
    ]
    done = max((row["step"] for row in metrics), default=0)
    steps = current_settings(run["recipe"])["train"]["max_steps"]
    lead = f"{run['recipe']['model']['load']}: {done} of {steps} steps, {run['ranks']} in parallel."
    return render_page("Fine-tuning", lead, _figures(metrics), sections)


def _points(metrics: Metrics, name: str) -> list[tuple[float, float | None]]:
    return [(row["step"], row[name]) for row in metrics if name in row]


def _figures(metrics: Metrics) -> list[Figure]:
    figures = []
    for name, label in (("loss", "loss"), ("validation_loss", "held-out loss")):
        if values := _values(metrics, name):
            note = "first and last, nats"
            figures.append(Figure(label=label, value=f"{values[0]:.3f} → {values[-1]:.3f}", note=note))
    for name, label in (("step_seconds", "seconds per step"), ("tokens_per_second", "tokens per second")):
        if values := _values(metrics, name):
            figures.append(Figure(label=label, value=short(median(values)), note="median"))
    return figures


def _values(metrics: Metrics, name: str) -> list[float]:
    return [value for _, value in _points(metrics, name) if value is not None]


def loss_chart(metrics: Metrics) -> Chart:
    """Draw the loss of each step, smoothed too, and of the held-out rows."""
    loss = _points(metrics, "loss")
    series = [
        Series(name="each step", points=loss, style="faint"),
        Series(name="smoothed", points=smooth(loss, 3)),
        Series(name="held-out rows", points=_points(metrics, "validation_loss"), style="dots", color=2),
    ]
    svg = line_chart(series, x_label="step", y_label="loss, nats", y_logarithmic=True)
    caption = (
        "What is minimised: the mean over the target tokens, or samples, of a step, with the samples' weights applied; "
        "smoothed with a half-life of 3 steps."
    )
    return Chart(svg=svg, caption=caption)


_CHARTED = ("validation_loss", "task_share")
"""Metrics that have one chart with a line for each task."""


def _tasks(metrics: Metrics) -> list[PageSection]:
    """Return how each task does and what its samples weigh, as far as the run measured it."""
    held_out = "Mean over the target tokens of a task's held-out rows."
    charts = [
        *_by_task(metrics, "validation_loss", "held-out loss", held_out),
        *_by_task(metrics, "task_share", "share of samples", _SHARES),
    ]
    weights = [_weights(metrics, task) for task in _tasks_with(metrics, "instance_weight_p50")]
    sections = [PageSection(title="Tasks", blocks=charts)] if charts else []
    return sections + ([PageSection(title="Instance weights", blocks=[_WEIGHTS, weights])] if weights else [])


def _tasks_with(metrics: Metrics, name: str) -> list[str]:
    return sorted({key.partition("/")[2] for row in metrics for key in row if key.startswith(f"{name}/")})


def _by_task(metrics: Metrics, name: str, label: str, caption: str) -> list[Chart]:
    """Return one chart with a line for each task; none where the run measured nothing of the kind.

    A task has the same colour in every chart.
    """
    tasks = sorted({task for each in _CHARTED for task in _tasks_with(metrics, each)})
    colors = {task: index % COLORS + 1 for index, task in enumerate(tasks)}
    series = [
        Series(name=task, points=_points(metrics, f"{name}/{task}"), color=colors[task])
        for task in _tasks_with(metrics, name)
    ]
    svg = line_chart(series, x_label="step", y_label=label, y_from_zero=True)
    return [Chart(svg=svg, caption=caption)] if series else []


def _weights(metrics: Metrics, task: str) -> Chart:
    series = [
        Series(name=f"{percent} %", points=_points(metrics, f"instance_weight_p{percent}/{task}"), style=style)
        for percent, style in ((10, "faint"), (50, "line"), (90, "faint"))
    ]
    return Chart(svg=line_chart(series, x_label="step", y_label="weight", size=_SMALL), caption=task)


def course_charts(metrics: Metrics) -> list[Chart]:
    """Draw what tells whether a run goes well besides its losses, as far as it measured that."""
    shown = (
        ("grad_norm", "gradient norm", "Before clipping."),
        ("learning_rate", "learning rate", "As the updates used it."),
        ("tokens_per_second", "tokens/s", "Whole job, prompts included."),
        ("expert_load_max_over_mean", "busiest / mean expert", "Averaged over the MoE layers; 1 is even."),
    )
    return [_small_chart(metrics, *chart) for chart in shown if _points(metrics, chart[0])]


def _small_chart(metrics: Metrics, name: str, label: str, caption: str) -> Chart:
    series = [Series(name=label, points=_points(metrics, name))]
    return Chart(svg=line_chart(series, x_label="step", y_label=label, y_from_zero=True, size=_SMALL), caption=caption)


def _leaves(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """Yield the dotted path and the text of everything in a tree of JSON objects."""
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            yield from _leaves(below, f"{path}.{name}" if path else name)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)
