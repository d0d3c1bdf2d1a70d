"""What a run did, for machines (report.json) and people (report.md): counts and samples of each filter's removals."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from conversion.atomic_file import write_small
from megatron_ads.config.generation import AnsweringConfig
from megatron_ads.config.synthesis import SynthesisConfig, synthesis_recipe_yaml
from megatron_ads.inference.client import Client
from megatron_ads.synthesis.candidates import Removed, by_row, passing
from megatron_ads.synthesis.pipeline import SynthesisModels, SynthesisResult
from megatron_ads.synthesis.removals import counts, removals, render, samples_of

JSON_FILE, TEXT_FILE, RECIPE_FILE = "report.json", "report.md", "recipe.yaml"


def write_report(result: SynthesisResult, models: SynthesisModels, config: SynthesisConfig) -> dict[str, Any]:
    """Write report.json, report.md and the resolved recipe next to the corpus; return what report.json holds."""
    out = Path(config.out)
    report = as_report(result, models, config)
    write_small(out / RECIPE_FILE, synthesis_recipe_yaml(config))
    write_small(out / TEXT_FILE, render_report(report))
    write_small(out / JSON_FILE, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    return report


def as_report(result: SynthesisResult, models: SynthesisModels, config: SynthesisConfig) -> dict[str, Any]:
    """Return the report as plain values."""
    kept = passing(result.candidates)
    groups = by_row(result.candidates)
    survivors = Counter(len(passing(group)) for group in groups.values())
    return {
        "sources": result.sources,
        "rows": {
            "read": result.rows_read,
            "left_out": dict(result.rows_left_out.most_common()),
            "asked_about": result.rows_by_task,
        },
        "golden": [
            {field.name: getattr(checked, field.name) for field in fields(checked)}
            | {"failed": samples_of(checked.failed, config.samples, config.seed)}
            for checked in result.golden
        ],
        "models": {
            name: _usage(client, settings)
            for name, client, settings in (
                ("teacher", models.teacher, config.teacher),
                ("verifier", models.verifier, config.verifier),
            )
            if client is not None
        },
        "candidates": len(result.candidates),
        "filters": removals(result.candidates, Removed, samples=config.samples, seed=config.seed),
        "similarity": _quantiles([item.similarity for item in result.candidates if item.similarity is not None]),
        "perplexity": {
            "threshold": result.threshold,
            **_quantiles([item.perplexity for item in result.candidates if item.perplexity is not None]),
        },
        "kept": len(kept),
        "kept_by_task": dict(sorted(Counter(candidate.row.task for candidate in kept).items())),
        "rows_by_kept_candidates": {str(number): survivors[number] for number in sorted(survivors)},
        "corpus": result.written,
        "samples_of_kept": samples_of(kept, config.samples, config.seed),
    }


def _usage(client: Client, config: AnsweringConfig) -> dict[str, Any]:
    # asdict would make a Counter of the pairs of a Counter.
    counted = {field.name: getattr(client.usage, field.name) for field in fields(client.usage)}
    derived = {"requests_per_second": client.usage.requests_per_second, "cost": client.usage.cost(config)}
    return {"model": config.model, "url": config.url, **counted, **derived}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    names = ("lowest", "quarter", "median", "three_quarters", "highest")
    return dict(zip(names, map(float, np.quantile(values, [0, 0.25, 0.5, 0.75, 1])), strict=True))


def render_report(report: dict[str, Any]) -> str:
    """Return the report for people, as Markdown."""
    return render("report.md.jinja", report=report, summary=summary_lines(report))


def summary_lines(report: dict[str, Any]) -> list[str]:
    """Return the numbers that matter, for a terminal too."""
    rows = report["rows"]
    asked = sum(rows["asked_about"].values())
    lines = [f"{rows['read']:,} rows read, {asked:,} asked about; left out: {counts(rows['left_out'])}."]
    lines += [_model_line(name, used) for name, used in report["models"].items()]
    removed = {found["filter"]: found["removed"] for found in report["filters"] if found["removed"]}
    lines.append(f"{report['candidates']:,} candidates, {report['kept']:,} kept; removed: {counts(removed)}.")
    if report["perplexity"]["threshold"] is not None:
        lines.append(f"Perplexity of the answer: kept below R = {report['perplexity']['threshold']:.4g}.")
    if survivors := report["rows_by_kept_candidates"]:
        numbers = ", ".join(f"{count:,} rows {kept}" for kept, count in survivors.items())
        lines.append(f"Candidates kept of a row: {numbers}.")
    failed = [result for result in report["golden"] if not result["passed"]]
    if failed:
        why = "; ".join(f"{result['task']} ({counts(result['failures'])})" for result in failed)
        lines.append(
            f"The golden check failed for {why}: rows whose templates all failed were not asked about. "
            "Look at the failures in report.md, then give other templates, or lower golden.pass_rate or "
            "golden.agreement."
        )
    if (written := report["corpus"]) is None:
        return [*lines, "No corpus was written."]
    neither = f", {written['left_out_by_split']:,} on neither side" if written["left_out_by_split"] else ""
    sides = f"{written['training_rows']:,} rows to train on, {written['validation_rows']:,} held out"
    return [*lines, f"Written: {sides}{neither}."]


def _model_line(name: str, used: dict[str, Any]) -> str:
    rate = "" if used["requests_per_second"] is None else f", {used['requests_per_second']:.3g} a second"
    cost = "" if used["cost"] is None else f", cost {used['cost']:.4g}"
    return (
        f"The {name} ({used['model']}): {used['asked']:,} requests answered{rate}, {used['from_journal']:,} before, "
        f"{used['gave_up']:,} without answer; failed attempts: {counts(used['failures'])}; "
        f"{used['prompt_tokens']:,} prompt and {used['answer_tokens']:,} answer tokens{cost}."
    )
