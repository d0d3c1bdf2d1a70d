"""The report of one training run: its curves and circumstances, from what the run wrote, as one HTML page."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.config.recipe_errors import current_settings
from megatron_ads.errors import MegatronAdsError
from megatron_ads.observability.log import get_logger
from megatron_ads.observability.metrics import read_metrics
from megatron_ads.observability.trackers import leaves
from megatron_ads.reporting.chart import COLORS, Chart, Series, line_chart, smooth
from megatron_ads.reporting.page import render

logger = get_logger(__name__)

REPORT_FILE = "report.html"
RUN_FILE = "run.json"

_SMALL = (360, 190)
_BY_TASK = {
    "validation_loss": ("held-out loss", "Mean over the target tokens of a task's held-out rows."),
    "task_share": (
        "share of samples",
        "Share of each task in the samples drawn from the evaluation on: in proportion to (1 - metric) ^ "
        "reweight.alpha. A task that stagnates gains share, one that is learned loses it.",
    ),
}
"""Metrics that have one chart with a line for each task: label and caption."""

_REWARD, _HELD_OUT_REWARD, _TEACHER = "critic/rewards/mean", "validation/reward", "teacher/reverse_kl"
_FAULTS, _SERVER_LOSSES = "rollout/faults/", "rollout/server_losses"

Metrics = Sequence[Mapping[str, Any]]


def write_run_report(folder: Path) -> None:
    """Write the page next to what the run wrote; a page that cannot be made is a warning, not the end of the run."""
    try:
        write_small(folder / REPORT_FILE, run_page(folder))
    except (MegatronAdsError, OSError) as error:
        logger.warning("%s could not be written: %s", folder / REPORT_FILE, error)


def run_page(folder: Path) -> str:
    """Return the page of the run whose ``run.json`` and ``metrics.jsonl`` are in ``folder``."""
    metrics = read_metrics(folder)
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    speeds = {"seconds per step": "step_seconds", "tokens per second": "tokens_per_second"}
    return render(
        "reporting/run.html.jinja",
        run=run,
        done=max((row["step"] for row in metrics), default=0),
        steps=current_settings(run["recipe"])["train"]["max_steps"],
        losses={"loss": _values(metrics, "loss"), "held-out loss": _values(metrics, "validation_loss")},
        worth={
            "reward": _values(metrics, _REWARD),
            "held-out reward": _values(metrics, _HELD_OUT_REWARD),
            "reverse KL": _values(metrics, _TEACHER),
        },
        medians={label: median(values) for label, name in speeds.items() if (values := _values(metrics, name))},
        loss=loss_chart(metrics),
        rewards=reward_charts(metrics),
        teacher=_teacher_charts(metrics),
        faults=fault_rows(metrics),
        tasks=[_task_chart(metrics, name) for name in _BY_TASK if _tasks_with(metrics, name)],
        weights=[_weights(metrics, task) for task in _tasks_with(metrics, "instance_weight_p50")],
        course=course_charts(metrics),
        circumstances=[(name, value if isinstance(value, str) else json.dumps(value)) for name, value in leaves(run)],
    )


def _points(metrics: Metrics, name: str) -> list[tuple[float, float | None]]:
    return [(row["step"], row[name]) for row in metrics if name in row]


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
    caption = (
        "What is minimised: the mean over the target tokens, or samples, of a step, with the samples' weights applied; "
        "smoothed with a half-life of 3 steps."
    )
    logarithmic = not (_values(metrics, _REWARD) or _values(metrics, _TEACHER))  # a policy's loss has either sign
    return Chart(line_chart(series, x_label="step", y_label="loss, nats", y_logarithmic=logarithmic), caption)


def reward_charts(metrics: Metrics) -> list[Chart]:
    """Draw what answers are worth, and what each of several rewards counts; nothing for a job without rewards."""
    rewards = _points(metrics, _REWARD)
    if not rewards:
        return []
    series = [
        Series(name="each step", points=rewards, style="faint"),
        Series(name="smoothed", points=smooth(rewards, 3)),
        Series(name="held-out prompts", points=_points(metrics, _HELD_OUT_REWARD), style="dots", color=2),
    ]
    caption = (
        "Mean over answers of their rewards, weighted and summed: sampled answers of each step, smoothed with a "
        "half-life of 3 steps, and greedy ones to held-out prompts."
    )
    several = (("critic/rewards", "reward", "Mean of each."), ("reward_weight", "weight", "What each counts."))
    lines = [_reward_lines(metrics, *each) for each in several if len(_tasks_with(metrics, "reward_weight")) > 1]
    return [Chart(line_chart(series, x_label="step", y_label="reward"), caption), *lines]


def _teacher_charts(metrics: Metrics) -> list[Chart]:
    """Draw how far a policy is from its teacher; nothing for a job without one."""
    if not (points := _points(metrics, _TEACHER)):
        return []
    series = [
        Series(name="each step", points=points, style="faint"),
        Series(name="smoothed", points=smooth(points, 3)),
    ]
    caption = (
        "Reverse KL: the log-probability of the policy's own tokens less the teacher's, mean over those of a step; "
        "smoothed with a half-life of 3 steps."
    )
    return [Chart(line_chart(series, x_label="step", y_label="reverse KL, nats"), caption)]


def fault_rows(metrics: Metrics) -> list[tuple[str, int, int, int]]:
    """Return each fault of the logged steps, how often it happened, in how many steps, and the last of these."""
    counts: dict[str, Counter[int]] = {}
    lost_before = 0.0
    for row in metrics:
        found = {name.removeprefix(_FAULTS): row[name] for name in row if name.startswith(_FAULTS)}
        if _SERVER_LOSSES in row:
            lost = row[_SERVER_LOSSES]  # since the job started: a job that continues counts from 0 again
            found["inference server lost"] = lost - lost_before if lost >= lost_before else lost
            lost_before = lost
        for name, count in found.items():
            if count:
                counts.setdefault(name, Counter())[row["step"]] += int(count)
    return [(name, steps.total(), len(steps), max(steps)) for name, steps in sorted(counts.items())]


def _reward_lines(metrics: Metrics, prefix: str, label: str, caption: str) -> Chart:
    """Draw a line for each reward."""
    suffix = "/mean" if prefix == "critic/rewards" else ""
    series = [
        Series(name=name, points=_points(metrics, f"{prefix}/{name}{suffix}"), color=index % COLORS + 1)
        for index, name in enumerate(_tasks_with(metrics, "reward_weight"))
    ]
    return Chart(line_chart(series, x_label="step", y_label=label), caption)


def _tasks_with(metrics: Metrics, name: str) -> list[str]:
    return sorted({key.partition("/")[2] for row in metrics for key in row if key.startswith(f"{name}/")})


def _task_chart(metrics: Metrics, name: str) -> Chart:
    """Draw a line for each task; a task has the same colour in every chart."""
    tasks = sorted({task for each in _BY_TASK for task in _tasks_with(metrics, each)})
    series = [
        Series(name=task, points=points, color=index % COLORS + 1)
        for index, task in enumerate(tasks)
        if (points := _points(metrics, f"{name}/{task}"))
    ]
    label, caption = _BY_TASK[name]
    return Chart(line_chart(series, x_label="step", y_label=label, y_from_zero=True), caption)


def _weights(metrics: Metrics, task: str) -> Chart:
    series = [
        Series(name=f"{percent} %", points=_points(metrics, f"instance_weight_p{percent}/{task}"), style=style)
        for percent, style in ((10, "faint"), (50, "line"), (90, "faint"))
    ]
    return Chart(line_chart(series, x_label="step", y_label="weight", size=_SMALL), task)


def course_charts(metrics: Metrics) -> list[Chart]:
    """Draw what tells whether a run goes well besides its losses, as far as it measured that."""
    shown = (
        ("grad_norm", "gradient norm", "Before clipping."),
        ("learning_rate", "learning rate", "As the updates used it."),
        ("rewards/margins", "margin", "Reward of the chosen answer less that of the best rejected one."),
        ("rewards/accuracies", "accuracy", "Share of prompts whose chosen answer has the highest reward."),
        ("response_length/mean", "answer, tokens", "Mean of the step's answers."),
        ("actor/entropy", "entropy, nats", "Mean over the answers' tokens."),
        ("actor/kl_loss", "KL, nats", "Estimate of the distance from the reference."),
        ("rollout/logprob_abs_diff", "difference, nats", "Between engine and trainer, over the answers."),
        ("tokens_per_second", "tokens/s", "Whole job, prompts included."),
        ("expert_load_max_over_mean", "busiest / mean expert", "Averaged over the MoE layers; 1 is even."),
    )
    charts = []
    for name, label, caption in shown:
        if points := _points(metrics, name):
            series = [Series(name=label, points=points)]
            svg = line_chart(series, x_label="step", y_label=label, y_from_zero=True, size=_SMALL)
            charts.append(Chart(svg, caption))
    return charts
