"""What the rehearsal's report says, as a page and as lines on the terminal; the numbers come from ``facts``."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ads.observability.chart import Series, line_chart, short, smooth
from megatron_ads.observability.progress import readable_duration
from megatron_ads.observability.report import Chart, Figure, Section, Table, render_page

Facts = Mapping[str, Any]
_SMALL = (360, 190)


def page(facts: Facts, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return ``report.html``."""
    sections = [
        _training(facts, metrics),
        _task(facts),
        _parity(facts),
        _circumstances(facts),
        _stages(facts),
        Section(title="Files", blocks=[Table(rows=_files(facts))]),
    ]
    return render_page("Quickstart report", _lead(facts), _figures(facts), sections)


def summary_lines(facts: Facts) -> list[str]:
    """Return what the terminal shows at the end."""
    rows = [(figure.label, figure.value, figure.note) for figure in _figures(facts)]
    width = max(len(label) for label, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows)
    return [f"  {label:<{width}}  {value:<{value_width}}  {note}".rstrip() for label, value, note in rows]


def _lead(facts: Facts) -> str:
    layout = facts["layout"]
    sizes = " x ".join(f"{name} {size}" for name, size in layout.items() if size > 1)
    return (
        f"A small random DeepSeek-V3-family checkpoint was fine-tuned on {facts['data']['description']}, "
        f"on Megatron-Core with {sizes}, and exported. It is a rehearsal of the machinery: "
        "the model starts from random weights, so its task metric says that learning works, not how good the method is."
    )


def _figures(facts: Facts) -> list[Figure]:
    training, parity = facts["training"], facts["parity"]
    before, after = facts["evaluation"]["before"], facts["evaluation"]["after"]
    improved = after["balanced_accuracy"] > after["baseline_balanced_accuracy"]
    return [
        Figure(
            label="loss",
            value=f"{training['loss_first']:.2f} → {training['loss_last']:.2f}",
            note=f"nats per target token, mean of the first and last {training['loss_averaged_over_steps']} steps",
            state="good" if training["loss_last"] < training["loss_first"] else "bad",
        ),
        Figure(
            label="balanced accuracy",
            value=f"{before['balanced_accuracy']:.2f} → {after['balanced_accuracy']:.2f}",
            note=f"{after['rows']} unseen rows; always the commonest label: {after['baseline_balanced_accuracy']:.2f}",
            state="good" if improved else "",
        ),
        Figure(
            label="logit difference",
            value=short(float(f"{parity['max_abs_difference']:.1e}")),
            note=f"transformers against Megatron, the largest; must be below {short(parity['limit'])}",
            state="good" if parity["passed"] else "bad",
        ),
        Figure(
            label="tokens per second",
            value=short(training["tokens_per_second"]),
            note=f"median step {training['step_seconds']:.2f} s, "
            f"{training['model_flops_per_second'] / 1e9:.3g} GFLOP/s of model arithmetic",
        ),
        Figure(label="time", value=readable_duration(facts["seconds"]), note="all stages, set-up not counted"),
    ]


def _points(metrics: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float | None]]:
    return [(row["step"], row[name]) for row in metrics if name in row]


def _training(facts: Facts, metrics: Sequence[Mapping[str, Any]]) -> Section:
    loss = _points(metrics, "loss")
    main = [
        Series(name="each step", points=loss, style="faint"),
        Series(name="smoothed", points=smooth(loss, 5)),
        Series(name="held-out rows", points=_points(metrics, "validation_loss"), style="dots", color=2),
    ]
    caption = "Mean over the target tokens (rationale and labels) of a step; smoothed with a half-life of 5 steps."
    small = [
        _small_chart(metrics, "grad_norm", "gradient norm", "Before clipping."),
        _small_chart(metrics, "learning_rate", "learning rate", "Warm-up, then the recipe's schedule."),
        _small_chart(metrics, "tokens_per_second", "tokens/s", "Whole job, prompts included."),
        _small_chart(
            metrics, "expert_load_max_over_mean", "busiest / mean expert", "Worst MoE layer; 1 is perfectly balanced."
        ),
    ]
    chart = Chart(svg=line_chart(main, x_label="step", y_label="loss, nats per token"), caption=caption)
    return Section(title="Fine-tuning", blocks=[chart, small])


def _small_chart(metrics: Sequence[Mapping[str, Any]], name: str, label: str, caption: str) -> Chart:
    series = [Series(name=label, points=_points(metrics, name))]
    return Chart(svg=line_chart(series, x_label="step", y_label=label, y_from_zero=True, size=_SMALL), caption=caption)


def _task(facts: Facts) -> Section:
    before, after = facts["evaluation"]["before"], facts["evaluation"]["after"]

    def row(label: str, name: str, baseline: str | None) -> list[str]:
        values = [f"{part[name]:.3f}" for part in (before, after)]
        return [label, *values, f"{after[baseline]:.3f}" if baseline else "–"]

    table = Table(
        head=["", "before", "after", "baseline"],
        rows=[
            row("balanced accuracy, bad against the rest", "balanced_accuracy", "baseline_balanced_accuracy"),
            row("accuracy over all labels", "accuracy", "baseline_accuracy"),
            row("share of answers that could be parsed", "parsed_share", None),
            row("share of answers the model ended itself", "ended_share", None),
        ],
        numbers=frozenset({1, 2, 3}),
    )
    text = (
        f"The model answered {after['rows']} rows of {after['queries']} queries that training never saw, greedily, "
        "run by transformers from the exported folder. The baseline always gives the commonest label. An answer that "
        f"cannot be parsed counts as wrong. 95 % interval of the balanced accuracy after: "
        f"± {after['balanced_accuracy_margin']:.3f}."
    )
    return Section(title="Relevance task", blocks=[text, table])


def _parity(facts: Facts) -> Section:
    parity = facts["parity"]
    verdict = "below" if parity["passed"] else "NOT below"
    return Section(
        title="Is the export the model that was trained?",
        blocks=[
            "The exported folder was loaded in transformers and the trained shards in Megatron-Core; both ran the "
            f"same {parity['tokens']} tokens in FP32. The largest difference of any logit is "
            f"{short(parity['max_abs_difference'])}, {verdict} the limit of {short(parity['limit'])}."
        ],
    )


def _circumstances(facts: Facts) -> Section:
    host, data = facts["host"], facts["data"]
    rows = [
        ["data", data["description"] + (f" ({data['path']})" if data.get("path") else "")],
        ["processor", f"{host['cpu']}, {host['cores']} cores, {host['memory_bytes'] / 2**30:.0f} GiB memory"],
        ["accelerators", ", ".join(host["gpus"]) or "none; gloo and CPU"],
        ["versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)],
        ["code revision", facts["revision"] or "unknown: not a git checkout"],
        ["written", facts["written"]],
    ]
    return Section(title="What was run, and on what", blocks=[Table(rows=rows)])


def _stages(facts: Facts) -> Section:
    rows = [[stage["title"], readable_duration(stage["seconds"])] for stage in facts["stages"]]
    rows.append(["together", readable_duration(facts["seconds"])])
    return Section(title="Stages", blocks=[Table(head=["stage", "time"], rows=rows, numbers=frozenset({1}))])


def _files(facts: Facts) -> list[list[str]]:
    return [[meaning, path] for path, meaning in facts["files"].items()]
