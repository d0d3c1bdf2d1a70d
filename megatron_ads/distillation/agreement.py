"""How often a student says what its teacher says, on rows that neither was trained on.

Over the rows with a label in the teacher's answer. A student's answer that cannot be read does not agree. Intervals are
bootstrapped over groups, such as queries and users; those of a difference between students pair their answers.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ads.data.split import group_of
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.metrics.intervals import ends, mean_interval
from megatron_ads.metrics.ranking import same_name
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.registry import TASKS, read_answer


@dataclass(slots=True)
class _OfTask:
    """The rows of one task with a label by the teacher."""

    agrees: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)


def agreement(student: Sequence[Answer], teacher: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Return for each task with labels the share of rows with the teacher's label, as JSON values.

    Args:
        student: Its answers to the same rows in the same order as the teacher's.
        teacher: The teacher's.
    """
    return {
        task: {
            "rows": len(rows.agrees),
            "agreement": sum(rows.agrees) / len(rows.agrees),
            "agreement_95": ends(mean_interval(rows.agrees, groups=rows.groups)),
        }
        for task, rows in _by_task(student, teacher).items()
    }


def agreement_gain(
    student: Sequence[Answer], other: Sequence[Answer], teacher: Sequence[Answer]
) -> dict[str, dict[str, Any]]:
    """Return for each task with labels by how much more often one student agrees than another one, as JSON values."""
    found = {}
    others = _by_task(other, teacher)
    for task, rows in _by_task(student, teacher).items():
        more = [own - its for own, its in zip(rows.agrees, others[task].agrees, strict=True)]
        found[task] = {
            "delta": sum(more) / len(more),
            "delta_95": ends(mean_interval(more, groups=rows.groups)),
        }
    return found


def _by_task(student: Sequence[Answer], teacher: Sequence[Answer]) -> dict[str, _OfTask]:
    found: dict[str, _OfTask] = defaultdict(_OfTask)
    for own, other in zip(student, teacher, strict=True):
        if (wanted := label_said(other)) is None:
            continue
        said = label_said(own)
        rows = found[own.row.task]
        rows.agrees.append(float(said is not None and same_name(said) == same_name(wanted)))
        rows.groups.append(group_of(own.row))
    return dict(sorted(found.items()))


def label_said(answer: Answer) -> str | None:
    """Return the label of an answer; None if it cannot be read, or its task has none."""
    label_of = TASKS[answer.row.task].label_of
    said = read_answer(answer.row, answer.text)
    return None if label_of is None or isinstance(said, ReadFailure) else label_of(said)
