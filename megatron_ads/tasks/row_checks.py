"""Rows that no model should be trained or judged on: what is wrong with them, by name, and how many there are.

Rows of tasks that the registry does not have, such as general conversations, are checked for texts only.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.rows import ChatRow, Fact, Role
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.ground_truth import agrees, ground_truth, truth_facts
from megatron_ads.tasks.registry import TASKS, Task, read_answer


class RowFault(StrEnum):
    """Why a row cannot be used; the first that applies is reported."""

    no_target = "no_target"
    """The conversation does not end with the assistant's message, or has nothing before it."""
    empty_text = "empty_text"
    """A message without text."""
    unreadable_target = "unreadable_target"
    """The target is no answer of the task: the task's parser says why, an unknown label or one off the scale."""
    label_differs = "label_differs"
    """The row's label is not the one in its target."""
    unreadable_ground_truth = "unreadable_ground_truth"
    """A row without an answer of its own whose ground truth tells no label of the task."""
    ground_truth_differs = "ground_truth_differs"
    """The answer among the row's facts is not the one in its target."""


@dataclass(frozen=True, slots=True)
class FaultyRow:
    """One row that was left out."""

    row_id: str
    task: str
    fault: RowFault
    reason: str = ""
    """The parser's failure, or both labels."""


@dataclass(slots=True)
class CheckedRows:
    """Rows that can be used, and those that cannot."""

    rows: list[ChatRow] = field(default_factory=list)
    faulty: list[FaultyRow] = field(default_factory=list)

    def counts(self) -> Counter[RowFault]:
        """Return how many rows have each fault."""
        return Counter(row.fault for row in self.faulty)


def check_rows(rows: Iterable[ChatRow]) -> CheckedRows:
    """Separate the rows that can be used from those that cannot; the order is kept.

    A row whose label is missing, or spelt otherwise than in its target, has the one in its target.
    """
    checked = CheckedRows()
    for row in rows:
        found = _examined(row)
        if isinstance(found, FaultyRow):
            checked.faulty.append(found)
        else:
            checked.rows.append(row if found in (None, row.label) else replace(row, label=found))
    return checked


def fault_of(row: ChatRow) -> FaultyRow | None:
    """Return what is wrong with a row; None if nothing is."""
    found = _examined(row)
    return found if isinstance(found, FaultyRow) else None


def _examined(row: ChatRow) -> FaultyRow | str | None:
    """Return what is wrong with a row; else the label in its target, None if its task has no labels."""
    if len(row.messages) < 2 or row.messages[-1].role is not Role.assistant:
        return FaultyRow(row.id, row.task, RowFault.no_target)
    if not all(message.content.strip() for message in row.messages):
        return FaultyRow(row.id, row.task, RowFault.empty_text)
    task = TASKS.get(row.task)
    if task is None:
        return None
    if row.facts.get(Fact.prompt_alone):
        return _label_of_truth(row, task)
    answer = read_answer(row, row.target)
    if isinstance(answer, ReadFailure):
        return FaultyRow(row.id, row.task, RowFault.unreadable_target, str(answer))
    label = task.label_of(answer) if task.label_of is not None else None
    if row.label is not None and label is not None and same_name(label) != same_name(row.label):
        reason = f"{row.label!r}, but the target says {label!r}"
        return FaultyRow(row.id, row.task, RowFault.label_differs, reason)
    if Fact.ground_truth in row.facts and not agrees(answer, row):
        known, said = (facts[Fact.ground_truth] for facts in (row.facts, truth_facts(answer)))
        reason = f"{known!r:.80}, but the target says {said!r:.80}"
        return FaultyRow(row.id, row.task, RowFault.ground_truth_differs, reason)
    return label


def _label_of_truth(row: ChatRow, task: Task) -> FaultyRow | str | None:
    """Return as ``_examined``, for a row whose target stands in for an answer: its ground truth is all it has."""
    if task.label_of is None or Fact.ground_truth not in row.facts:
        return None
    try:
        label = task.label_of(ground_truth(row, task.answer))
    except DataError as error:
        return FaultyRow(row.id, row.task, RowFault.unreadable_ground_truth, str(error))
    if row.label is not None and same_name(label) != same_name(row.label):
        reason = f"{row.label!r}, but the ground truth says {label!r}"
        return FaultyRow(row.id, row.task, RowFault.label_differs, reason)
    return label
