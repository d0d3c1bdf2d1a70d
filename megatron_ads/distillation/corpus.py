"""What a student learns from: the teacher's answers, under quality control or all that can be read, and a report."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.config.distillation import DistillConfig, Student
from megatron_ads.distillation.quality import control, passing
from megatron_ads.distillation.questions import JUDGED, write_rows
from megatron_ads.distillation.teacher_answers import TeacherAnswer, Unfit, read_teacher_answers
from megatron_ads.errors import DataError
from megatron_ads.observability.log import get_logger
from megatron_ads.stable_random import stable_key
from megatron_ads.synthesis.removals import counts, removals, render, samples_of

logger = get_logger(__name__)

_ONE_SIDED = 0.5
"""Quality control is one-sided where a label is kept less than half as often as the labels of its task together."""
_FEW = 20
"""Answers of a label from which on that is told."""


def rows_file(out: Path, student: Student) -> Path:
    """Return where the rows of a student are; its report is beside them."""
    return out / "rows" / f"{student}.jsonl"


def write_corpus(config: DistillConfig, questions_file: Path, student: Student) -> dict[str, Any]:
    """Write a student's rows, in an order of their own, and the report on them; return what that holds.

    Raises:
        DataError: If the teacher's answers cannot be read, or none is left.
    """
    left_out = Counter[str]()
    answers = read_teacher_answers(config, questions_file, left_out)
    if student is Student.checked:
        control(answers, config)
    report = report_on(answers, config, student) | {"left_out": left_out[JUDGED]}
    file, kept = rows_file(Path(config.out), student), passing(answers)
    ordered = sorted((answer.row for answer in kept), key=lambda row: stable_key(config.seed, "order", row.id))
    write_rows(file, ordered)
    write_small(file.with_suffix(".json"), json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    text = render("removals.md.jinja", filters=report["filters"])
    write_small(
        file.with_suffix(".md"), "\n".join([f"# Rows of the student {student}", "", *_summary(report), "", text])
    )
    for warning in report["one_sided"]:
        logger.warning("%s. %s has samples of what each rule removed", warning, file.with_suffix(".md"))
    if not kept:
        raise DataError(
            f"none of the teacher's {len(answers):,} answers is left for the student {student}: "
            f"{counts(_removed(report))}. {file.with_suffix('.md')} has samples; lower the rules in quality."
        )
    return report


def report_on(answers: Sequence[TeacherAnswer], config: DistillConfig, student: Student) -> dict[str, Any]:
    """Return what was kept and removed, as JSON values."""
    kept = passing(answers)
    return {
        "student": str(student),
        "quality": asdict(config.quality) if student is Student.checked else None,
        "answers": len(answers),
        "kept": len(kept),
        "kept_by_task": dict(sorted(Counter(answer.row.task for answer in kept).items())),
        "labels": {"answered": _labels(answers), "kept": _labels(kept)},
        "one_sided": one_sided(answers),
        "filters": removals(answers, Unfit, samples=config.samples, seed=config.seed),
        "samples_of_kept": samples_of(kept, config.samples, config.seed),
    }


def _labels(answers: Sequence[TeacherAnswer]) -> dict[str, dict[str, int]]:
    """Return how often each label was given, by task; names are too many to count."""
    return {task: dict(labels.most_common(10)) for task, labels in sorted(_label_counts(answers).items())}


def _label_counts(answers: Sequence[TeacherAnswer]) -> defaultdict[str, Counter[str]]:
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        if answer.row.label is not None:
            found[answer.row.task][answer.row.label] += 1
    return found


def one_sided(answers: Sequence[TeacherAnswer]) -> list[str]:
    """Return a sentence for each label of which quality control keeps much less than of its task's other labels.

    Rules that remove what is short, or mentions little, take one label before others where its reasons are brief.
    """
    given, kept = _label_counts(answers), _label_counts(passing(answers))
    found = []
    for task, labels in given.items():
        share = kept[task].total() / labels.total()
        for label, count in labels.items():
            of_label = kept[task][label] / count
            if count >= _FEW and of_label < _ONE_SIDED * share:
                found.append(f"of {task}, {of_label:.0%} of label {label} is kept, and {share:.0%} of all labels")
    return found


def _removed(report: dict[str, Any]) -> dict[str, int]:
    return {found["filter"]: found["removed"] for found in report["filters"] if found["removed"]}


def _summary(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{report['answers']:,} answers, {report['kept']:,} kept; removed: {counts(_removed(report))}.",
        f"Kept by task: {counts(report['kept_by_task'])}.",
    ]
    for task, kept in report["labels"]["kept"].items():
        lines.append(f"Labels of {task}: {counts(kept)}; before: {counts(report['labels']['answered'][task])}.")
    return [*lines, *(f"**One-sided**: {warning}." for warning in report["one_sided"])]
