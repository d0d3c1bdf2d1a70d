"""How often a student says what its teacher says, on rows that neither was trained on.

Over the rows with a label in the teacher's answer. A student's answer that cannot be read does not agree. Intervals are
bootstrapped over groups, such as queries and users.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from megatron_ads.data.split import group_of
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.metrics.intervals import ends, mean_interval
from megatron_ads.metrics.ranking import same_name
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.registry import TASKS, read_answer


def agreement(student: Sequence[Answer], teacher: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Return for each task with labels the share of rows with the teacher's label, as JSON values.

    Args:
        student: Its answers to the same rows in the same order as the teacher's.
        teacher: The teacher's.
    """
    same: dict[str, list[float]] = defaultdict(list)
    groups: dict[str, list[str]] = defaultdict(list)
    for own, other in zip(student, teacher, strict=True):
        if (wanted := label_said(other)) is None:
            continue
        said = label_said(own)
        same[own.row.task].append(float(said is not None and same_name(said) == same_name(wanted)))
        groups[own.row.task].append(group_of(own.row))
    return {
        task: {
            "rows": len(values),
            "agreement": sum(values) / len(values),
            "agreement_95": ends(mean_interval(values, groups=groups[task])),
        }
        for task, values in sorted(same.items())
    }


def label_said(answer: Answer) -> str | None:
    """Return the label of an answer; None if it cannot be read, or its task has none."""
    label_of = TASKS[answer.row.task].label_of
    said = read_answer(answer.row, answer.text)
    return None if label_of is None or isinstance(said, ReadFailure) else label_of(said)
