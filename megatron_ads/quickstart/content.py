"""What the quickstart reports: numbers gathered from its stages, metrics and machine, as JSON, page and lines."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from megatron_ads.parity.compare_logits import LIMIT
from megatron_ads.progress import readable_duration
from megatron_ads.quickstart.stages import StageRecord
from megatron_ads.quickstart.workflow import QuickstartFolder, QuickstartPlan
from megatron_ads.reporting.page import fixed, render, short, text_table, tiny
from megatron_ads.reporting.run_report import course_charts, loss_chart, reward_charts
from megatron_ads.tasks.relevance import TASK

Facts = Mapping[str, Any]
_ENDS = 10
"""Steps that the loss at the start and at the end is averaged over."""


def gather_facts(
    folder: QuickstartFolder,
    plan: QuickstartPlan,
    records: Mapping[str, StageRecord],
    metrics: Sequence[Mapping[str, Any]],
    *,
    data: Mapping[str, Any],
    provenance: Mapping[str, Any],
    of_rl: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return everything the report says, as JSON values; ``provenance`` is of the function of that name.

    ``of_rl`` are the metrics of the reinforcement learning, if there was any.
    """
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "family": plan.family,
        "data": dict(data),
        "layout": {name: getattr(plan.config.layout, name) for name in ("tp", "cp", "pp", "vpp", "ep", "etp")},
        "training": training_facts(metrics),
        "evaluation": {
            "before": records["evaluate-before"].result["tasks"][TASK],
            "after": records["evaluate-after"].result["tasks"][TASK],
            "after_fp8": records["evaluate-fp8"].result["tasks"][TASK],
        },
        "rl": rl_facts(of_rl, records["evaluate-rl"].result["tasks"][TASK]) if of_rl else None,
        "parity": {**records["compare-logits"].result, "limit": LIMIT},
        "examples": examples(folder.answers("after")),
        "fp8_export": records["verify-fp8"].result,
        "stages": [{"name": one.name, "title": one.title, "seconds": records[one.name].seconds} for one in plan.stages],
        "seconds": sum(record.seconds for record in records.values()),
        **provenance,
        "files": {str(path): meaning for path, meaning in folder.described().items()},
    }


def training_facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise the lines of ``metrics.jsonl``: loss at both ends (mean of up to ten steps), typical speed, memory."""

    def column(name: str) -> list[float]:
        return [row[name] for row in rows if row.get(name) is not None]

    losses, validation = column("loss"), column("validation_loss")
    return {
        "steps": len(losses),
        "loss_first": mean(losses[:_ENDS]),
        "loss_last": mean(losses[-_ENDS:]),
        "loss_averaged_over_steps": min(_ENDS, len(losses)),
        "validation_loss_last": validation[-1] if validation else None,
        "tokens_per_second": median(column("tokens_per_second")),
        "tflops_per_gpu": median(column("tflops_per_gpu")),
        "step_seconds": median(column("step_seconds")),
        "max_memory_allocated": max(column("max_memory_allocated"), default=None),
    }


def rl_facts(rows: Sequence[Mapping[str, Any]], evaluation: Facts) -> dict[str, Any]:
    """Summarise reinforcement learning: mean reward at both ends, as of the loss, and the evaluation afterwards."""
    rewards = [row["critic/rewards/mean"] for row in rows if row.get("critic/rewards/mean") is not None]
    ends = {"reward_first": mean(rewards[:_ENDS]), "reward_last": mean(rewards[-_ENDS:])}
    return {"steps": len(rewards), **ends, "evaluation": dict(evaluation)}


def examples(answers: Path) -> list[dict[str, Any]]:
    """Return the first answer to a row of each label, as the evaluation wrote them."""
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    first = {row["expected"]: row for row in reversed(rows)}
    return [first[label] for label in sorted(first)]


class Figure(NamedTuple):
    """One headline number."""

    label: str
    value: str
    note: str
    state: str = ""
    """``good``, ``bad`` or empty: how the number is marked."""


def page(facts: Facts, metrics: Sequence[Mapping[str, Any]], of_rl: Sequence[Mapping[str, Any]] = ()) -> str:
    seconds = [*((stage["title"], stage["seconds"]) for stage in facts["stages"]), ("together", facts["seconds"])]
    return render(
        "quickstart/report.html.jinja",
        facts=facts,
        figures=_figures(facts),
        loss=loss_chart(metrics),
        rewards=reward_charts(of_rl),
        course=course_charts(metrics),
        scores=_scores(facts["evaluation"]),
        examples=[(example["prompt"], example["expected"], example["text"]) for example in facts["examples"]],
        stages=[(title, readable_duration(taken)) for title, taken in seconds],
        files=[(meaning, path) for path, meaning in facts["files"].items()],
    )


def summary_lines(facts: Facts) -> list[str]:
    rows = [
        ("", *(text.replace("\N{NON-BREAKING HYPHEN}", "-") for text in (figure.label, figure.value, figure.note)))
        for figure in _figures(facts)
    ]
    return text_table(rows, [""] * 4, left=[""])


def _balanced_accuracy(scores: Facts, line: str = "model", view: str = "bad") -> float | None:
    value: float | None = scores["views"][view].get(line, {}).get("balanced_accuracy")
    return value


def _figures(facts: Facts) -> list[Figure]:
    training, parity = facts["training"], facts["parity"]
    before, after = (_balanced_accuracy(facts["evaluation"][when]) for when in ("before", "after"))
    baseline = _balanced_accuracy(facts["evaluation"]["after"], "baseline")
    improved = after is not None and baseline is not None and after > baseline
    return [
        Figure(
            "loss",
            f"{training['loss_first']:.2f} → {training['loss_last']:.2f}",
            f"nats per target token, mean of the first and last {training['loss_averaged_over_steps']} steps",
            "good" if training["loss_last"] < training["loss_first"] else "bad",
        ),
        Figure(
            "balanced accuracy",
            f"{fixed(before, 2)} → {fixed(after, 2)}",
            f"bad against the rest, unseen queries; always the commonest label: {fixed(baseline, 2)}",
            "good" if improved else "",
        ),
        *_rl_figures(facts["rl"]),
        Figure(
            "logit difference",
            tiny(float(f"{parity['max_abs_difference']:.1e}")),
            f"transformers against Megatron, the largest; must be below {tiny(parity['limit'])}",
            "good" if parity["passed"] else "bad",
        ),
        Figure(
            "tokens per second",
            short(training["tokens_per_second"]),
            f"median step {training['step_seconds']:.2f} s, "
            f"{training['tflops_per_gpu'] * 1e3:.3g} GFLOP/s of model arithmetic per process",
        ),
        Figure("time", readable_duration(facts["seconds"]), "all stages, set-up not counted"),
    ]


def _rl_figures(rl: Facts | None) -> list[Figure]:
    if rl is None:
        return []
    reward = f"{rl['reward_first']:.2f} → {rl['reward_last']:.2f}"
    accuracy = fixed(_balanced_accuracy(rl["evaluation"]), 2)
    note = f"of sampled answers, at both ends of {rl['steps']} steps; balanced accuracy afterwards: {accuracy}"
    return [Figure("reward", reward, note)]


def _scores(evaluation: Facts) -> list[list[str]]:
    """Return the rows of the table of scores: before, after, after from FP8, and the lines that are compared."""
    parts = [evaluation[when] for when in ("before", "after", "after_fp8")]
    after, lines = evaluation["after"], ("baseline", "text_baseline", "reachable")
    rows: list[list[Any]] = []
    for view, meaning in (("bad", "bad against the rest"), ("fair", "good against the rest")):
        models = [_balanced_accuracy(part, view=view) for part in parts]
        others = [_balanced_accuracy(after, line, view) for line in lines]
        rows.append([f"balanced accuracy, {meaning}", *models, *others])
    accuracies = [*(part["accuracy"] for part in parts), after["baseline_accuracy"]]
    rows.append(["accuracy over the three labels", *accuracies, None, None])
    rows.append(["share of answers that could be read", *(part["readable_share"] for part in parts), None, None, None])
    return [[label, *map(fixed, values)] for label, *values in rows]
