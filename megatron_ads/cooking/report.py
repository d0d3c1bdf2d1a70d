"""What a run did, for machines (report.json) and people (report.md): counts and samples of each filter's removals."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ads.cooking.answering import Desk
from megatron_ads.cooking.candidates import Candidate, Removed, by_row, passing
from megatron_ads.cooking.config import AnsweringConfig, CookConfig, cook_recipe_yaml
from megatron_ads.cooking.cook import Cooked, Kitchen
from megatron_ads.cooking.requests import drawn

JSON_FILE, TEXT_FILE, RECIPE_FILE = "report.json", "report.md", "recipe.yaml"
_SHOWN_CHARACTERS = 600
_REASONS_SHOWN = 8


def write_report(cooked: Cooked, kitchen: Kitchen, config: CookConfig) -> dict[str, Any]:
    """Write report.json, report.md and the resolved recipe next to the corpus; return what report.json holds."""
    from conversion.atomic_file import write_small  # imports torch

    out = Path(config.out)
    report = as_report(cooked, kitchen, config)
    write_small(out / RECIPE_FILE, cook_recipe_yaml(config))
    write_small(out / TEXT_FILE, render_report(report))
    write_small(out / JSON_FILE, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    return report


def as_report(cooked: Cooked, kitchen: Kitchen, config: CookConfig) -> dict[str, Any]:
    """Return the report as plain values."""
    kept = passing(cooked.candidates)
    groups = by_row(cooked.candidates)
    survivors = Counter(len(passing(group)) for group in groups.values())
    return {
        "sources": cooked.sources,
        "rows": {
            "read": cooked.rows_read,
            "left_out": dict(cooked.rows_left_out.most_common()),
            "asked_about": cooked.rows_by_task,
        },
        "golden": [asdict(result) for result in cooked.golden],
        "models": {
            name: _usage(desk, settings)
            for name, desk, settings in (
                ("teacher", kitchen.teacher, config.teacher),
                ("verifier", kitchen.verifier, config.verifier),
            )
            if desk is not None
        },
        "candidates": len(cooked.candidates),
        "filters": _filters(cooked.candidates, config),
        "similarity": _quantiles([item.similarity for item in cooked.candidates if item.similarity is not None]),
        "perplexity": {
            "threshold": cooked.threshold,
            **_quantiles([item.perplexity for item in cooked.candidates if item.perplexity is not None]),
        },
        "kept": len(kept),
        "kept_by_task": dict(sorted(Counter(candidate.row.task for candidate in kept).items())),
        "rows_by_kept_candidates": {str(number): survivors[number] for number in sorted(survivors)},
        "corpus": None if cooked.written is None else asdict(cooked.written),
        "samples_of_kept": [_sample(item) for item in _drawn(kept, config)],
    }


def _usage(desk: Desk, config: AnsweringConfig) -> dict[str, Any]:
    counted = {field.name: getattr(desk.usage, field.name) for field in fields(desk.usage)}
    return {"model": config.model, "url": config.url, **counted, "cost": desk.usage.cost(config)}


def _filters(candidates: Sequence[Candidate], config: CookConfig) -> list[dict[str, Any]]:
    """Return, in the order of the filters, how many candidates came to each and how many it removed."""
    entered = len(candidates)
    found = []
    for why in Removed:
        gone = [candidate for candidate in candidates if candidate.removed is why]
        found.append(
            {
                "filter": str(why),
                "entered": entered,
                "removed": len(gone),
                "reasons": dict(Counter(candidate.reason for candidate in gone).most_common(_REASONS_SHOWN)),
                "samples": [_sample(candidate) for candidate in _drawn(gone, config)],
            }
        )
        entered -= len(gone)
    return found


def _drawn(candidates: Sequence[Candidate], config: CookConfig) -> list[Candidate]:
    return sorted(candidates, key=lambda item: drawn(config.seed, "report", item.name))[: config.samples]


def _sample(candidate: Candidate) -> dict[str, Any]:
    return {
        "id": candidate.name,
        "task": candidate.row.task,
        "reason": candidate.reason,
        "text": candidate.text[:_SHOWN_CHARACTERS],
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    names = ("lowest", "quarter", "median", "three_quarters", "highest")
    return dict(zip(names, map(float, np.quantile(values, [0, 0.25, 0.5, 0.75, 1])), strict=True))


def render_report(report: dict[str, Any]) -> str:
    """Return the report for people, as Markdown."""
    lines = ["# Cooked reasoning", "", *(f"- {source}" for source in report["sources"]), ""]
    lines += [render_summary(report), "", "## Golden set", ""]
    for result in report["golden"]:
        rates = ", ".join(f"{rate:.2f}" for rate in result["pass_rates"])
        agreement = "undefined" if result["agreement"] is None else f"{result['agreement']:.2f}"
        lines.append(
            f"- {result['task']}, {result['template']}: {'passed' if result['passed'] else 'FAILED'}; pass rates of "
            f"the wordings {rates} over {result['rows']} rows, agreement {agreement}; failures: "
            f"{_counts(result['failures'])}"
        )
        if result["sample"]:
            lines += ["", _quoted(result["sample"]), ""]
    lines += ["", "## Filters", "", "| filter | entered | removed | most frequent reasons |"]
    lines.append("| --- | ---: | ---: | --- |")
    for found in report["filters"]:
        reasons = _counts({name: count for name, count in found["reasons"].items() if name}).replace("|", "\\|")
        lines.append(f"| {found['filter']} | {found['entered']:,} | {found['removed']:,} | {_one_line(reasons)} |")
    for found in report["filters"]:
        if found["samples"]:
            lines += ["", f"### Removed by {found['filter']}"]
            for sample in found["samples"]:
                lines += _shown(sample)
    lines += ["", "## Kept"]
    for sample in report["samples_of_kept"]:
        lines += _shown(sample)
    return "\n".join(lines) + "\n"


def render_summary(report: dict[str, Any]) -> str:
    """Return the numbers that matter, for a terminal too."""
    rows = report["rows"]
    asked = sum(rows["asked_about"].values())
    lines = [f"{rows['read']:,} rows read, {asked:,} asked about; left out: {_counts(rows['left_out'])}."]
    for name, used in report["models"].items():
        cost = "" if used["cost"] is None else f", cost {used['cost']:.4g}"
        lines.append(
            f"The {name} ({used['model']}) answered {used['asked']:,} requests, {used['from_journal']:,} answers were "
            f"there already, {used['gave_up']:,} requests have none; failed attempts: {_counts(used['failures'])}; "
            f"{used['prompt_tokens']:,} + {used['answer_tokens']:,} tokens{cost}."
        )
    removed = {found["filter"]: found["removed"] for found in report["filters"] if found["removed"]}
    lines.append(f"{report['candidates']:,} candidates, {report['kept']:,} kept; removed: {_counts(removed)}.")
    if report["perplexity"]["threshold"] is not None:
        lines.append(f"Perplexity of the answer: kept below R = {report['perplexity']['threshold']:.4g}.")
    numbers = {f"{kept} kept": count for kept, count in report["rows_by_kept_candidates"].items()}
    lines.append(f"Rows by candidates: {_counts(numbers)}.")
    if failed := [result["task"] for result in report["golden"] if not result["passed"]]:
        lines.append(f"The golden check failed for {', '.join(failed)}: nothing was asked at scale about these rows.")
    if report["corpus"] is None:
        lines.append("No corpus was written.")
    else:
        written = report["corpus"]
        lines.append(
            f"Written: {written['training_rows']:,} rows to train on, {written['validation_rows']:,} held out"
            + (f", {written['left_out_by_split']:,} on neither side." if written["left_out_by_split"] else ".")
        )
    return "\n".join(lines)


def _shown(sample: dict[str, Any]) -> list[str]:
    why = f": {_one_line(sample['reason'])}" if sample["reason"] else ""
    return ["", f"{sample['id']} ({sample['task']}){why}", "", _quoted(sample["text"])]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_SHOWN_CHARACTERS]


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
