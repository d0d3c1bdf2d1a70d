"""What the quickstart report says, as a page and as lines on the terminal; the numbers come from ``facts``."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ads.progress import readable_duration
from megatron_ads.reporting.chart import short
from megatron_ads.reporting.page import Figure, PageSection, Table, render_page
from megatron_ads.reporting.run_report import course_charts, loss_chart

Facts = Mapping[str, Any]


def page(facts: Facts, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return ``report.html``."""
    sections = [
        PageSection(title="Fine-tuning", blocks=[loss_chart(metrics), course_charts(metrics)]),
        _task(facts),
        _parity(facts),
        _circumstances(facts),
        _stages(facts),
        PageSection(title="Files", blocks=[Table(rows=_files(facts))]),
    ]
    return render_page("Quickstart report", _lead(facts), _figures(facts), sections)


def summary_lines(facts: Facts) -> list[str]:
    """Return what the terminal shows at the end."""
    rows = [
        [text.replace("\N{NON-BREAKING HYPHEN}", "-") for text in (figure.label, figure.value, figure.note)]
        for figure in _figures(facts)
    ]
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


def _balanced_accuracy(scores: Facts, who: str = "model") -> float | None:
    value: float | None = scores["views"]["bad"][who]["balanced_accuracy"]
    return value


def _shown(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _tiny(value: float) -> str:
    """Write a small number so that no line break comes into its exponent."""
    return short(value).replace("-", "\N{NON-BREAKING HYPHEN}")


def _figures(facts: Facts) -> list[Figure]:
    training, parity = facts["training"], facts["parity"]
    before, after = (_balanced_accuracy(facts["evaluation"][when]) for when in ("before", "after"))
    baseline = _balanced_accuracy(facts["evaluation"]["after"], "baseline")
    improved = after is not None and baseline is not None and after > baseline
    return [
        Figure(
            label="loss",
            value=f"{training['loss_first']:.2f} → {training['loss_last']:.2f}",
            note=f"nats per target token, mean of the first and last {training['loss_averaged_over_steps']} steps",
            state="good" if training["loss_last"] < training["loss_first"] else "bad",
        ),
        Figure(
            label="balanced accuracy",
            value=f"{_shown(before, 2)} → {_shown(after, 2)}",
            note=f"bad against the rest, unseen queries; always the commonest label: {_shown(baseline, 2)}",
            state="good" if improved else "",
        ),
        Figure(
            label="logit difference",
            value=_tiny(float(f"{parity['max_abs_difference']:.1e}")),
            note=f"transformers against Megatron, the largest; must be below {_tiny(parity['limit'])}",
            state="good" if parity["passed"] else "bad",
        ),
        Figure(
            label="tokens per second",
            value=short(training["tokens_per_second"]),
            note=f"median step {training['step_seconds']:.2f} s, "
            f"{training['tflops_per_gpu'] * 1e3:.3g} GFLOP/s of model arithmetic per process",
        ),
        Figure(label="time", value=readable_duration(facts["seconds"]), note="all stages, set-up not counted"),
    ]


def _task(facts: Facts) -> PageSection:
    scores = facts["evaluation"]
    before, after, fp8 = scores["before"], scores["after"], scores["after_fp8"]
    parts = (before, after, fp8)
    balanced = {
        f"balanced accuracy, {meaning}": [
            *(_shown(part["views"][view]["model"]["balanced_accuracy"]) for part in parts),
            *(_other_line(after["views"][view], line) for line in ("baseline", *_MORE_LINES)),
        ]
        for view, meaning in (("bad", "bad against the rest"), ("fair", "good against the rest"))
    }
    shares = {
        "accuracy over the three labels": [
            *(_shown(part["accuracy"]) for part in parts),
            _shown(after["baseline_accuracy"]),
            *["–"] * len(_MORE_LINES),
        ],
        "share of answers that could be read": [
            *(_shown(part["readable_share"]) for part in parts),
            *["–"] * (1 + len(_MORE_LINES)),
        ],
    }
    table = Table(
        head=["", "before", "after", "after, from FP8", f"always {after['baseline_label']}", *_MORE_LINES.values()],
        rows=[[label, *values] for label, values in (balanced | shares).items()],
        numbers=frozenset(range(1, 5 + len(_MORE_LINES))),
    )
    shown = Table(
        head=["question", "true label", "answer after fine-tuning"],
        rows=[[example["prompt"], example["expected"], example["text"]] for example in facts["examples"]],
    )
    return PageSection(
        title="Relevance task", blocks=[_task_text(after), table, "One held-out row of each label:", shown]
    )


_MORE_LINES = {"text_baseline": "TF-IDF, logistic regression", "reachable": "best reachable"}
"""Of a view of the labels, where there are such."""


def _other_line(view: Facts, line: str) -> str:
    return _shown(view[line]["balanced_accuracy"]) if line in view else "–"


def _task_text(after: Facts) -> str:
    labels = ", ".join(f"{count} {label}" for label, count in after["label_counts"].items())
    interval = after["views"]["bad"]["balanced_accuracy_95"]
    between = (
        f" Resampling the queries, 95 % of the balanced accuracies after (bad against the rest) lie between "
        f"{interval[0]:.2f} and {interval[1]:.2f}."
        if interval
        else ""
    )
    return (
        f"transformers ran the exported folder on {after['rows']} rows ({labels}) of {after['queries']} queries that "
        "training never saw, greedily; every answer gives its reasons, then its label. An answer that cannot be read "
        f"counts as wrong. {after['baseline_label']} is the commonest label in training."
        f"{between}"
    )


def _parity(facts: Facts) -> PageSection:
    parity = facts["parity"]
    verdict = "below" if parity["passed"] else "NOT below"
    return PageSection(
        title="Is the export the model that was trained?",
        blocks=[
            "The exported folder was loaded in transformers and the trained shards in Megatron-Core; both ran the "
            f"same {parity['tokens']} tokens in FP32. The largest difference of any logit is "
            f"{_tiny(parity['max_abs_difference'])}, {verdict} the limit of {_tiny(parity['limit'])}.",
            _fp8_text(facts["fp8_export"]),
        ],
    )


def _fp8_text(verified: Facts) -> str:
    verdict = "hold exactly the same values" if verified["equal"] else "DIFFER; see the log of verify-fp8"
    return (
        "It was exported in FP8 with block scales as well, as DeepSeek publishes its models, and read back in BF16: "
        f"the two folders {verdict} in {verified['compared']} tensors. Rounding to FP8 changes the weights, so the "
        "task is measured on it separately."
    )


def _circumstances(facts: Facts) -> PageSection:
    host, data = facts["host"], facts["data"]
    rows = [
        ["data", data["description"] + (f" ({data['path']})" if data.get("path") else "")],
        ["processor", f"{host['cpu']}, {host['cores']} cores, {host['memory_bytes'] / 2**30:.0f} GiB memory"],
        ["accelerators", ", ".join(host["gpus"]) or "none; gloo and CPU"],
        ["versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)],
        ["code revision", facts["revision"] or "unknown: not a git checkout"],
        ["written", facts["written"]],
    ]
    return PageSection(title="What was run, and on what", blocks=[Table(rows=rows)])


def _stages(facts: Facts) -> PageSection:
    rows = [[stage["title"], readable_duration(stage["seconds"])] for stage in facts["stages"]]
    rows.append(["together", readable_duration(facts["seconds"])])
    return PageSection(title="Stages", blocks=[Table(head=["stage", "time"], rows=rows, numbers=frozenset({1}))])


def _files(facts: Facts) -> list[list[str]]:
    return [[meaning, path] for path, meaning in facts["files"].items()]
