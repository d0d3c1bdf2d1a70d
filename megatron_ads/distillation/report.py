"""What came of a distillation: how near the students come to the teacher, for machines and for people.

A line for the teacher and each student: agreement with the teacher, the leading metric of each task against the true
answers, and AdNanny's table 6 where queries are generated.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ads.config.distillation import DistillConfig, Student
from megatron_ads.distillation.agreement import agreement
from megatron_ads.distillation.questions import judged_rows
from megatron_ads.distillation.workflow import (
    DIFFERENCE,
    ON_POLICY,
    ON_POLICY_DIFFERENCE,
    TEACHER,
    judged_file,
)
from megatron_ads.evaluation.given_answers import read_given_answers
from megatron_ads.quickstart.stages import StageRecord
from megatron_ads.reporting.markdown import markdown

Report = Mapping[str, Any]
_BALANCED = "balanced_accuracy"
QUERIES = {
    "relevance": "Relevance", "diversity": "Diversity", "difficulty": "Difficulty",
    "click_attribute_ratio": "Click Attr. Ratio",
}  # fmt: skip


def report_on(config: DistillConfig, records: Mapping[str, StageRecord]) -> dict[str, Any]:
    """Return the report as JSON values.

    Raises:
        DataError: If answers to the judged rows cannot be read.
    """
    out = Path(config.out)
    rows = judged_rows(config).tasks
    students = [*config.students, *([ON_POLICY] if config.on_policy.steps else [])]
    said = {name: read_given_answers(judged_file(out, name), rows) for name in (TEACHER, *students)}
    models: dict[str, Any] = {}
    for name, answers in said.items():
        models[str(name)] = {
            "agreement": {} if name == TEACHER else agreement(answers, said[TEACHER]),
            "rows": _rows(records[f"{name}-rows"].result) if name in config.students else None,
            "minutes": _minutes(records, name),
            "scores": records[f"{name}-scores"].result,
        }
    asked = records["questions"].result if "questions" in records else None
    difference, on_policy = (
        records[name].result if name in records else None for name in (DIFFERENCE, ON_POLICY_DIFFERENCE)
    )
    return {
        "out": config.out, "asked": asked, "judged_rows": len(rows), "models": models, "difference": difference,
        "on_policy_difference": None if on_policy is None else {"of": config.students[0], **on_policy},
    }  # fmt: skip


def _rows(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return of the report on a student's rows what needs no more than a line."""
    removed = {found["filter"]: found["removed"] for found in result["filters"] if found["removed"]}
    return {**{name: result[name] for name in ("answers", "kept", "kept_by_task")}, "removed": removed}


def _minutes(records: Mapping[str, StageRecord], name: str) -> float:
    """Return what the stages of a model took: those of its name, and the teacher's answers."""
    own = [stage for stage in records if stage in (name, f"{name}-rows", f"{name}-scores")]
    own += [stage for stage in records if name == TEACHER and stage.startswith("answers-")]
    return sum(records[stage].seconds for stage in own) / 60


def text_of(report: Report) -> str:
    """Return the report for people, as Markdown."""
    parts = ["# Distillation", _corpora(report), "Against the true answers, and with the teacher:", _scores(report)]
    if generated := _queries(report):
        parts += ["Query generation (AdNanny, table 6), with 95 % of resampled keywords:", generated]
    paired = "on the same rows, with 95 % of a paired bootstrap:"
    models = report["models"]
    if found := report["difference"]:
        table = _difference(models, found, Student.checked, Student.unchecked)
        parts += [f"What quality control adds, {paired}", table]
    if found := report["on_policy_difference"]:
        parts += [f"What on-policy distillation adds, {paired}", _difference(models, found, ON_POLICY, found["of"])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _corpora(report: Report) -> str:
    table = [["student", "answers", "kept", "removed", "minutes"]]
    for name, found in report["models"].items():
        if rows := found["rows"]:
            removed = ", ".join(f"{why} {count:,}" for why, count in rows["removed"].items()) or "none"
            table.append([name, f"{rows['answers']:,}", f"{rows['kept']:,}", removed, f"{found['minutes']:.1f}"])
    return markdown(table)


def _scores(report: Report) -> str:
    """Return a line for each dataset and model; the metric is the one that stands for the task."""
    table = [["dataset", "model", "metric", "value", "agrees with the teacher", "readable"]]
    for dataset in report["models"][TEACHER]["scores"]["tasks"]:
        for name, found in report["models"].items():
            scores = found["scores"]["tasks"][dataset]
            metric, value, interval = leading(scores)
            agrees = found["agreement"].get(scores["task"], {})
            table.append(
                [
                    dataset, name, metric, f"{_shown(value)}{_between(interval)}",
                    f"{_shown(agrees.get('agreement'))}{_between(agrees.get('agreement_95'))}",
                    _shown(scores["readable_share"]),
                ]
            )  # fmt: skip
    return markdown(table)


def leading(scores: Mapping[str, Any]) -> tuple[str, float | None, list[float] | None]:
    """Return name, value and interval of what stands for a dataset."""
    if "headline_name" in scores:
        return scores["headline_name"] or "", scores["headline"], scores["headline_95"]
    view = scores["views"]["bad"]
    return f"bad/{_BALANCED}", view["model"][_BALANCED], view[f"{_BALANCED}_95"]


def _queries(report: Report) -> str:
    table = [["model", *QUERIES.values(), "queries"]]
    for name, found in report["models"].items():
        for scores in found["scores"]["tasks"].values():
            if "generated" in scores:
                line = scores["generated"]["lines"]["model"]
                table.append([name, *(_cell(line, field) for field in QUERIES), str(line["queries"])])
    return markdown(table) if len(table) > 1 else ""


def _difference(models: Mapping[str, Any], difference: Mapping[str, Any], name: str, other: str) -> str:
    table = [["dataset", "metric", other, name, "difference"]]
    for dataset, metrics in difference["metrics"].items():
        for metric, of in metrics.items():
            apart = f"{_signed(of['delta'])}{_signed_between(of['delta_95'])}"
            table.append([dataset, metric, _shown(of["compared"]), _shown(of["model"]), apart])
    for task, of in difference["agreement"].items():
        values = [models[each]["agreement"][task]["agreement"] for each in (other, name)]
        apart = f"{_signed(of['delta'])}{_signed_between(of['delta_95'])}"
        table.append([task, "agreement with the teacher", *map(_shown, values), apart])
    return markdown(table)


def _cell(line: Mapping[str, Any], field: str) -> str:
    """Return a share in per cent, as the paper has it."""
    value, interval = line[field], line[f"{field}_95"]
    if value is None:
        return "–"
    return f"{100 * value:.2f}" + (f" ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})" if interval else "")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _signed_between(interval: list[float] | None) -> str:
    return f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else ""


def _between(interval: list[float] | None) -> str:
    return f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
