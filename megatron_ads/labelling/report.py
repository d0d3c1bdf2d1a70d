"""What a job came to: counts, costs in the columns of AdNanny's table 10, labels, drift against the last job, failures.

Everything is computed from the files of labels, which are read one after another.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megatron_ads.config.labelling import LabelConfig
from megatron_ads.labelling.parquet_files import epoch_files, metadata_of, read_table
from megatron_ads.labelling.question_store import LABELS, QuestionStore
from megatron_ads.reporting.page import fixed, render, text_table, write_report

_SAMPLES = 5
_SHOWN_CHARACTERS = 300
_LINE_CHARACTERS = 160
_MOST_LABELS = 20
_OTHERS = "all others"
COST_HEAD = ("model", "input tokens", "output tokens", "price, 1/s", "rows/s", "cost of 1M rows", "cost ratio")


@dataclass(slots=True)
class Totals:
    """Sums over all epochs."""

    rows: int = 0
    asked: int = 0
    """Rows that the model was asked about."""
    draws: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cached_tokens: int | None = None
    seconds: float = 0.0
    """Spent on epochs of which nothing had been answered before, by whoever labelled them."""
    timed_rows: int = 0
    started: float = math.inf
    finished: float = 0.0
    labels: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By task."""
    failures: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    of_tasks: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[dict[str, str]]] = field(default_factory=lambda: defaultdict(list))
    """Of failures."""
    log_probabilities: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    """By task: sum and count."""


def report_of(config: LabelConfig) -> dict[str, Any]:
    """Return what a job's folder holds, as JSON values."""
    out = Path(config.out)
    totals = totals_of(out)
    read = QuestionStore(out, config).read_so_far()
    before = totals_of(Path(config.previous[-1])).labels if config.previous else {}
    counts = {name: count for name, count in read.counts.items() if name != "read" and count}
    failed = sum(each.total() for each in totals.failures.values())
    return {
        "model": config.model.model,
        "reasoning": config.reasoning,
        "out": str(out),
        "rows_read": read.counts["read"],
        "not_asked": counts,
        "rows": totals.rows,
        "labelled": totals.rows - failed,
        "failed": failed,
        "tasks": {task: _of_task(task, totals, before.get(task)) for task in sorted(totals.of_tasks)},
        "samples": dict(sorted(totals.samples.items())),
        "cost": _cost(config, totals),
    }


def totals_of(folder: Path) -> Totals:
    """Return the sums over the labels of a job.

    Raises:
        DataError: If a file is damaged.
    """
    totals = Totals()
    for file in epoch_files(folder / LABELS):
        _add(totals, file)
    return totals


_SUMMED = (
    "task", "label", "failure", "draws", "prompt_tokens", "cached_tokens", "answer_tokens", "log_probability",
)  # fmt: skip


def _add(totals: Totals, file: Path) -> None:
    table, about = read_table(file, _SUMMED), metadata_of(file)
    totals.rows += table.num_rows
    totals.asked += _sum(pc.greater(table["draws"], 0))
    totals.draws += _sum(table["draws"])
    totals.prompt_tokens += _sum(table["prompt_tokens"])
    totals.answer_tokens += _sum(table["answer_tokens"])
    if table["cached_tokens"].null_count < table.num_rows:
        totals.cached_tokens = (totals.cached_tokens or 0) + _sum(table["cached_tokens"])
    read = table.filter(pc.is_null(table["failure"]))
    for task, failure, count in _counts(table.filter(pc.is_valid(table["failure"])), "failure"):
        totals.failures[task][failure] += count
    for task, label, count in _counts(read.filter(pc.is_valid(read["label"])), "label"):
        totals.labels[task][label] += count
    by_task = table.group_by("task").aggregate([([], "count_all"), *((_LOG, how) for how in ("sum", "count"))])
    for task, rows, summed, count in zip(*(by_task[name].to_pylist() for name in _BY_TASK), strict=True):
        totals.of_tasks[task] += rows
        both = totals.log_probabilities[task]
        both[0], both[1] = both[0] + (summed or 0.0), both[1] + count
    _sample(totals, file, set(pc.unique(table["failure"]).to_pylist()) - {None})
    if about["answered_before"] == "0":
        seconds, finished = float(about["seconds"]), float(about["finished_at"])
        totals.seconds += seconds
        totals.timed_rows += table.num_rows
        totals.started = min(totals.started, finished - seconds)
        totals.finished = max(totals.finished, finished)


_LOG = "log_probability"
_BY_TASK = ("task", "count_all", f"{_LOG}_sum", f"{_LOG}_count")


def _sum(column: Any) -> int:
    return int(pc.sum(column).as_py() or 0)


def _counts(table: pa.Table, name: str) -> Iterator[tuple[str, str, int]]:
    counted = table.group_by(["task", name]).aggregate([([], "count_all")])
    yield from zip(*(counted[each].to_pylist() for each in ("task", name, "count_all")), strict=True)


def _sample(totals: Totals, file: Path, failures: Collection[str]) -> None:
    """Keep the first rows of each kind of failure."""
    wanted = {failure for failure in failures if len(totals.samples[failure]) < _SAMPLES}
    if not wanted:
        return
    table = read_table(file, ["id", "task", "text", "failure"])
    for record in table.filter(pc.is_in(table["failure"], pa.array(sorted(wanted)))).to_pylist():
        found = totals.samples[record["failure"]]
        if len(found) < _SAMPLES:
            shown = {name: record[name] or "" for name in ("id", "task", "text")}
            found.append({name: _shown(text) for name, text in shown.items()})


def _shown(text: str) -> str:
    """Return a text, of a long one both ends: how an answer ends tells why it cannot be read."""
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def _of_task(task: str, totals: Totals, before: Counter[str] | None) -> dict[str, Any]:
    labels, failures = totals.labels[task], totals.failures[task]
    sum_of, count = totals.log_probabilities[task]
    return {
        "rows": totals.of_tasks[task],
        "labels": _most(labels),
        "failures": dict(failures.most_common()),
        "mean_log_probability": sum_of / count if count else None,
        "before": _most(before) if before else None,
        "drift": population_stability(labels, before) if before and labels else None,
    }


def _most(counts: Counter[str]) -> dict[str, int]:
    shown = dict(counts.most_common(_MOST_LABELS))
    rest = counts.total() - sum(shown.values())
    return shown | ({_OTHERS: rest} if rest else {})


def population_stability(now: Mapping[str, int], before: Mapping[str, int]) -> float:
    """Return the population stability index of two distributions of labels: sum of (p - q) ln(p / q).

    A label that one of them lacks counts as half a row there. Below 0.1 is commonly called stable, above 0.25 a shift.
    """
    names = sorted({*now, *before})

    def shares(counts: Mapping[str, int]) -> list[float]:
        given = [counts.get(name, 0) or 0.5 for name in names]
        return [count / sum(given) for count in given]

    return sum((p - q) * math.log(p / q) for p, q in zip(shares(now), shares(before), strict=True))


def _cost(config: LabelConfig, totals: Totals) -> dict[str, Any]:
    """Return the columns of AdNanny's table 10, and what is beside it; None where it is not known."""
    asked = totals.asked
    # Epochs that overlap, as on Ray, are timed from the first start to the last end.
    seconds = min(totals.seconds, totals.finished - totals.started) if totals.timed_rows else 0.0
    rate = totals.timed_rows / seconds if seconds else None
    price = None if config.gpus is None else config.gpus * (config.gpu_price_per_second or 0.0)
    million = None if price is None or rate is None else 1e6 / rate * price
    model = config.model
    if million is None and model.input_price is not None and model.output_price is not None and totals.rows:
        tokens = totals.prompt_tokens * model.input_price + totals.answer_tokens * model.output_price
        million = tokens / totals.rows
    return {
        "input_tokens": totals.prompt_tokens / asked if asked else None,
        "output_tokens": totals.answer_tokens / asked if asked else None,
        "price_per_second": price,
        "rows_per_second": rate,
        "million_rows": million,
        "ratio": None if million is None or not config.baseline_cost else million / config.baseline_cost,
        "asked": asked,
        "draws": totals.draws,
        "cached_share": None
        if totals.cached_tokens is None or not totals.prompt_tokens
        else totals.cached_tokens / totals.prompt_tokens,
    }


def cost_row(report: Mapping[str, Any]) -> list[str]:
    """Return the line under ``COST_HEAD``."""
    cost, kind = report["cost"], "label + reasoning" if report["reasoning"] else "label only"
    numbers = ("input_tokens", "output_tokens", "price_per_second", "rows_per_second", "million_rows", "ratio")
    digits = (0, 0, 4, 2, 2, 2)
    return [
        f"{report['model']} ({kind})",
        *(fixed(cost[name], places) for name, places in zip(numbers, digits, strict=True)),
    ]


def summary(report: Mapping[str, Any]) -> str:
    """Return what is printed."""
    not_asked = "".join(f", {count:,} {reason}" for reason, count in report["not_asked"].items())
    failed = f", {report['failed']:,} failed" if report["failed"] else ""
    lines = [f"{report['rows_read']:,} rows read{not_asked}", f"{report['labelled']:,} labelled{failed}"]
    for task, found in report["tasks"].items():
        total = sum(found["labels"].values())
        shares = ", ".join(f"{label} {count / total:.1%}" for label, count in found["labels"].items())
        drift = "" if found["drift"] is None else f"; drift (PSI) {found['drift']:.3f}"
        lines.append(f"{task or 'task unknown'}: {found['rows']:,} rows{': ' if shares else ''}{shares}{drift}")
        for reason, count in found["failures"].items():
            first = next((one for one in report["samples"].get(reason, ()) if one["task"] == task), None)
            example = "" if first is None else f", such as {first['id']}: {first['text']}"
            lines.append(f"  {reason} {count:,}{example}"[:_LINE_CHARACTERS].replace("\n", " "))
    if report["cost"]["asked"]:
        lines += text_table([cost_row(report)], COST_HEAD, left=["model"])
    if (cached := report["cost"]["cached_share"]) is not None:
        lines.append(f"{cached:.1%} of the prompts' tokens came from the server's prefix cache")
    return "\n".join([*lines, f"{report['out']}/report.html"])


def write(report: Mapping[str, Any]) -> None:
    """Write ``report.json`` and ``report.html``."""
    page = render("labelling/report.html.jinja", report=report, cost=cost_row(report), cost_head=COST_HEAD)
    write_report(Path(report["out"]), page, json.loads(json.dumps(report)))
